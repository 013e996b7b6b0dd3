"""DGC and 1-bit Adam beside what they are where nothing is compressed, and what they refuse."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, dgc, onebit_adam
from dtrain.comm.compressors.sparse import TopK
from dtrain.comm.feedback import Compression
from dtrain.comm.methods.dgc import MomentumCorrection
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.method import Sync
from dtrain.comm.runtime.saved import require_same_sync
from dtrain.comm.state import State
from dtrain.compress import error_feedback, powersgd, quantize, topk
from dtrain.testing import WorkerPool
from dtrain.testing.replicas import Replicas

STEPS, WARMUP = 9, 4


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5, 7, generator=generator), torch.randn(5, 3, generator=generator)


def trained(method: Callable[[], Sync], inner: Callable[..., torch.optim.Optimizer]) -> Tensor:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(7, 3))
    attached = attach(model, inner(model.parameters()), method())
    for step in range(STEPS):
        x, y = batch(dist.get_rank(), step)
        (model(x) - y).square().mean().backward()
        attached.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def mean_gradients(weights: list[Tensor], step: int, world: int) -> list[Tensor]:
    """By hand, of the linear model ``weights`` = (weight, bias)."""
    total = [torch.zeros_like(w) for w in weights]
    for rank in range(world):
        x, y = batch(rank, step)
        leaves = [w.clone().requires_grad_() for w in weights]
        loss = (x @ leaves[0].T + leaves[1] - y).square().mean()
        for sum_, g in zip(total, torch.autograd.grad(loss, leaves), strict=True):
            sum_ += g / world
    return total


def first_weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [p.detach().clone() for p in nn.Linear(7, 3).parameters()]


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]


def plain_sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


def onebit_dense() -> Tensor:
    return trained(lambda: onebit_adam(WARMUP, compress=topk(1.0)), adamw)


def dgc_dense() -> Tensor:
    return trained(lambda: dgc(1.0), plain_sgd)


@pytest.mark.processes
def test_1_bit_adam_without_loss_is_adam_whose_variance_stands_still(pool: WorkerPool) -> None:
    weights = first_weights()
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    b1, b2 = 0.9, 0.999
    for step in range(STEPS):
        for index, g in enumerate(mean_gradients(weights, step, 2)):
            m[index] = b1 * m[index] + (1 - b1) * g
            if step < WARMUP:
                v[index] = b2 * v[index] + (1 - b2) * g.square()
                m_hat, v_hat = m[index] / (1 - b1 ** (step + 1)), v[index] / (1 - b2 ** (step + 1))
            else:
                m_hat, v_hat = m[index], v[index]
            weights[index] = weights[index] * (1 - 0.01 * 0.1) - 0.01 * m_hat / (v_hat.sqrt() + 1e-8)
        if step == WARMUP - 1:  # the bias corrections of the last step of the warm-up stay
            m = [part / (1 - b1**WARMUP) for part in m]
            v = [part / (1 - b2**WARMUP) for part in v]
    wanted = torch.cat([w.reshape(-1) for w in weights])
    for found in pool.run(onebit_dense, world=2):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.processes
def test_dgc_that_sends_everything_has_no_momentum_left(pool: WorkerPool) -> None:
    weights = first_weights()
    for step in range(STEPS):
        for index, g in enumerate(mean_gradients(weights, step, 2)):
            weights[index] = weights[index] - 0.1 * g
    wanted = torch.cat([w.reshape(-1) for w in weights])
    for found in pool.run(dgc_dense, world=2):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_dgc_has_sent_leaves_both_of_its_sums() -> None:
    feedback = dgc(0.1).exchange.plan.compressions[0].feedback
    state, g = State(feedback.kinds), torch.tensor([1.0, 2.0, 4.0])
    for _ in range(2):
        corrected = feedback.correct("w", g, state)
        feedback.retain("w", g, corrected, torch.tensor([0.0, 0.0, float(corrected[2])]), state)
        state.commit()
    assert state.tensors["w"]["velocity"].tolist() == pytest.approx([1.9, 3.8, 0.0])
    assert state.tensors["w"]["residual"].tolist() == pytest.approx([2.9, 5.8, 0.0])


@pytest.mark.parametrize(
    ("density", "stages"),
    [
        (0.001, [0.25, 0.0625, 0.015625, 0.00390625, 0.001]),  # the paper's
        (0.01, [0.25, 0.0625, 0.015625, 0.01, 0.01]),
        (0.5, [0.5] * 5),
    ],
)
def test_the_warm_up_has_the_stages_of_the_paper(density: float, stages: list[float]) -> None:
    plan = dgc(density, warmup_steps=50).exchange.plan
    found = []
    for step in (0, 11, 12, 24, 25, 36, 37, 49, 50, 500):  # stages begin at a quarter of the warm-up each
        compressor = plan.of("w", step).compressor
        assert isinstance(compressor, TopK)
        found.append(compressor.density)
    assert found == [stage for stage in stages for _ in range(2)]


def test_a_state_from_within_a_warm_up_fits_another_schedule() -> None:
    """Its tensors do not depend on the densities of the stages; the final one and the momentum have to agree."""

    def state_of(*stages: float, momentum: float = 0.9) -> str:
        settings = (str(Compression(topk(stage), MomentumCorrection(momentum))) for stage in stages)
        return f"every_step: {'; '.join(settings)}"

    five = {"sync": state_of(0.25, 0.131, 0.069, 0.036, 0.019, 0.01)}
    require_same_sync(five, state_of(0.25, 0.0625, 0.015625, 0.01, 0.01), None)
    replicas = Replicas(dgc(0.01, warmup_steps=8), 2)
    replicas.train(3)
    states = replicas.all(lambda rank: copy.deepcopy(replicas.attached[rank].state_dict()) | five)
    replicas.all(lambda rank: replicas.attached[rank].load_state_dict(states[rank]))
    replicas.close()
    for other in (state_of(0.25, 0.02), state_of(0.25, 0.01, momentum=0.8), "every_step: fp32"):
        with pytest.raises(ValueError, match="this state was saved with"):
            require_same_sync(five, other, None)


def refusals() -> list[str]:
    messages = []
    cases: list[tuple[Sync, Callable[..., torch.optim.Optimizer]]] = [
        (dgc(), adamw),
        (dgc(), lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
        (onebit_adam(3), plain_sgd),
        (onebit_adam(3), lambda ps: torch.optim.AdamW(ps, amsgrad=True)),
    ]
    for method, inner in cases:
        model = DistributedDataParallel(nn.Linear(7, 3))
        try:
            attach(model, inner(model.parameters()), method)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.processes
def test_optimizers_that_make_no_sense_are_refused(pool: WorkerPool) -> None:
    wanted = ["it is AdamW", "it is SGD, momentum [0.9]", "the inner optimizer is SGD", "does not know amsgrad"]
    for messages in pool.run(refusals, world=2):
        assert len(messages) == len(wanted)
        assert all(words in message for words, message in zip(wanted, messages, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: onebit_adam(0), "warmup_steps is 0; the variance needs at least one step"),
        (lambda: dgc(momentum=1.0), "momentum is 1.0; give a number in [0, 1)"),
        (lambda: dgc(warmup_steps=3), "warmup_steps is 3; give 0, or at least 4"),
        (lambda: dgc(0), "density is 0"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


SENT_AS: dict[str, Compress] = {
    "sign": None,
    "fp32": topk(1.0),
    "8 bits": error_feedback(quantize(bits=8, block=64)),
    "top-k": error_feedback(topk(0.1)),
    "powersgd": error_feedback(powersgd(2)),
}


def unseen_rows() -> dict[str, tuple[float, float, float]]:
    """How far a padding row, rows that never occur, and rows that occur after the warm-up only have moved."""
    found = {}
    for name, compress in SENT_AS.items():
        torch.manual_seed(0)
        embedding = nn.Embedding(40, 16, padding_idx=0)
        head, warm = nn.Linear(16, 4), [1e-12]  # its weight has next to no gradient in the warm-up
        head.weight.register_hook(lambda gradient, warm=warm: gradient * warm[-1])
        model = DistributedDataParallel(nn.Sequential(embedding, nn.Tanh(), head))
        attached = attach(model, torch.optim.Adam(model.parameters(), lr=1e-2), onebit_adam(15, compress=compress))
        first, generator = embedding.weight.detach().clone(), torch.Generator().manual_seed(1 + dist.get_rank())
        for step in range(60):
            tokens = torch.randint(1, 32 if step < 30 else 36, (64,), generator=generator)
            tokens[::8] = 0
            warm.append(1e-12 if step < 15 else 1.0)
            nn.functional.cross_entropy(model(tokens), tokens % 4).backward()
            attached.step()
        moved = (embedding.weight.detach() - first).abs()
        parts = (moved[0], torch.cat([moved[32:], head.weight.detach().abs()]), moved[1:32])
        found[name] = tuple(float(part.max()) for part in parts)
        attached.detach()
    return found  # type: ignore[return-value]


@pytest.mark.processes
def test_1_bit_adam_leaves_alone_what_the_warm_up_has_not_seen(pool: WorkerPool) -> None:
    for name, (padding, others, seen) in pool.run(unseen_rows, world=2)[0].items():
        assert padding == 0 and others < 3 and seen < 3, (name, padding, others, seen)


def huge(step: int, size: float) -> tuple[list[int], bool]:
    """The steps that were not made, and whether all that is kept is finite."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(7, 3))
    attached = attach(model, torch.optim.Adam(model.parameters(), lr=0.01), onebit_adam(4))
    left_out = []
    for number in range(9):
        x, y = batch(dist.get_rank(), number)
        loss = (model(x) - y).square().mean()
        (loss * size if number == step and dist.get_rank() else loss).backward()
        if not attached.step():
            left_out.append(number)
    kept = [tensor for named in attached.state.tensors.values() for tensor in named.values()]
    finite = all(bool(tensor.isfinite().all()) for tensor in (*kept, *model.parameters()))
    attached.detach()
    return left_out, finite


@pytest.mark.processes
@pytest.mark.parametrize("step", [2, 6])
def test_1_bit_adam_goes_on_after_a_huge_gradient(pool: WorkerPool, step: int) -> None:
    for left_out, finite in pool.run(huge, step, 1e25, world=2):
        assert left_out == [step] and finite


def frozen_or_unused(engine: str) -> tuple[float, float]:
    """How far a layer moves that is frozen behind the warm-up, and one that is reached in the warm-up only."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.long = layers, True

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.layers[0](x))
            return self.layers[2](x + self.layers[1](x) if self.long else x)  # type: ignore[no-any-return]

    net, group = Net(), None
    if engine == "ddp":
        model: nn.Module = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        for layer in layers:
            fully_shard(layer, mesh=mesh["shard"])
        fully_shard(net, mesh=mesh["shard"])
        model, group = net, mesh.get_group("replicate")
    attached = attach(model, torch.optim.Adam(net.parameters(), lr=1e-2), onebit_adam(8), replicate_group=group)

    def weights() -> list[Tensor]:
        return [getattr(layer.weight, "to_local", lambda w=layer.weight: w)().detach().clone() for layer in layers]

    before: list[Tensor] = []
    for step in range(24):
        if step == 12:
            before, net.long = weights(), False
            layers[0].requires_grad_(False)
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        attached.step()
    attached.detach()
    moved = [float((now - then).abs().max()) for now, then in zip(weights(), before, strict=True)]
    assert moved[2] > 0
    return moved[0], moved[1]


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_1_bit_adam_leaves_alone_what_has_no_gradient(pool: WorkerPool, engine: str) -> None:
    for found in pool.run(frozen_or_unused, engine, world=2):
        assert found == (0.0, 0.0)
