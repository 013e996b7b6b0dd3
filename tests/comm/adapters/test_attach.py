"""`attach` on models that somebody else built: what it does, what it refuses, and that it can be taken off again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

from dtrain import attach, diloco, every_step, local_sgd
from dtrain.comm.adapters.adapter import pieces_of
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, powersgd, quantize, topk
from dtrain.testing import WorkerPool
from dtrain.train.mesh import build_mesh

pytestmark = pytest.mark.processes


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 19), nn.Tanh(), nn.Linear(19, 3))


def data(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5, 7, generator=generator), torch.randn(5, 3, generator=generator)


def backward(model: nn.Module, rank: int, step: int) -> None:
    x, y = data(rank, step)
    (model(x) - y).square().mean().backward()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def sharded(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model, mesh.get_group("replicate")


# --- one job for each question, run in real processes ---------------------------------------------------------------


def dense_on_ddp_and_by_hand() -> tuple[Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    ddp, plain = DistributedDataParallel(small()), small()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ddp, plain)]
    attached = attach(ddp, optimizers[0], every_step())
    for step in range(5):
        backward(ddp, rank, step)
        assert attached.step()
        for other in range(world):
            backward(plain, other, step)
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter.grad /= world
        optimizers[1].step()
        optimizers[1].zero_grad()
    return flat(ddp), flat(plain)


def dense_on_user_fsdp2(clip: float) -> tuple[Tensor, Tensor]:
    model, peers = sharded(small())
    plain = small()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain)]
    attached = attach(model, optimizers[0], every_step(), replicate_group=peers)
    for step in range(5):
        backward(model, dist.get_rank(), step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        assert attached.step()
        for other in range(4):
            backward(plain, other, step)
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter.grad /= 4
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizers[1].step()
        optimizers[1].zero_grad()
    attached.detach()
    return torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()]), flat(plain)  # type: ignore[attr-defined]


def replicas_start_equal() -> Tensor:
    ddp = DistributedDataParallel(small(seed=dist.get_rank()), process_group=dist.new_subgroups(1)[0])
    peers = dist.new_group(list(range(dist.get_world_size())))
    attach(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), local_sgd(every_steps=3), replicate_group=peers)
    return flat(ddp)


def no_sync_accumulates() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    twice, once = DistributedDataParallel(small()), DistributedDataParallel(small())
    results = []
    for model in (twice, once):
        attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step())
        if model is twice:
            with model.no_sync():
                backward(model, rank, 0)
            backward(model, rank, 1)
        else:
            (x0, y0), (x1, y1) = data(rank, 0), data(rank, 1)
            ((model(x0) - y0).square().mean() + (model(x1) - y1).square().mean()).backward()
        attached.step()
        results.append(flat(model))
    return results[0], results[1]


def state_dict_round_trip(kind: str) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    specs: dict[str, Sync] = {
        "ef": every_step(compress=error_feedback(quantize(bits=8, block=16))),
        "diloco": diloco(every_steps=3, compress=error_feedback(quantize(bits=8, block=16))),
    }

    def fresh() -> tuple[DistributedDataParallel, torch.optim.Optimizer, Attached]:
        model = DistributedDataParallel(small())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, attach(model, optimizer, specs[kind])

    model, optimizer, attached = fresh()
    for step in range(4):
        backward(model, rank, step)
        attached.step()
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), attached.state_dict()])
    file = io.BytesIO()
    torch.save(saved[2], file)
    file.seek(0)
    other_model, other_optimizer, other = fresh()
    other_model.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 8):
        for m, a in ((model, attached), (other_model, other)):
            backward(m, rank, step)
            a.step()
    return flat(model), flat(other_model)


def detached_and_attached_again(kind: str) -> tuple[Tensor, Tensor]:
    """Parameters after a step with a sync, a step without one, and one with another; and by one process alone."""
    world, plain = dist.get_world_size(), small()
    model: nn.Module
    peers = None
    if kind == "ddp":
        model = DistributedDataParallel(small())
    else:
        model, peers = sharded(small())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for step, sync in enumerate((every_step(), None, every_step(compress=quantize(bits=8)))):
        attached = attach(model, optimizers[0], sync, replicate_group=peers) if sync else None
        backward(model, dist.get_rank(), step)
        if attached:
            attached.step()
            attached.detach()
        elif kind == "ddp":
            optimizers[0].step()
        optimizers[0].zero_grad()
        for other in range(world):
            backward(plain, other, step)
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter.grad /= world
        if attached or kind == "ddp":
            optimizers[1].step()
        optimizers[1].zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole]), flat(plain)


def gradients_under_a_local_update() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Before, under and after a sync that leaves gradients alone: what DDP left, this rank's own, and the mean."""
    rank, world, model = dist.get_rank(), dist.get_world_size(), DistributedDataParallel(small())
    found, attached = [], None
    for step in range(3):
        if step == 1:
            attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), diloco(every_steps=100))
        elif attached is not None:
            attached.detach()
        backward(model, rank, step)
        each = []
        for other in range(world):
            plain = small()
            backward(plain, other, step)
            each.append(torch.cat([p.grad.reshape(-1) for p in plain.parameters() if p.grad is not None]))
        left = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        found.append((left, each[rank], torch.stack(each).mean(0)))
        model.zero_grad()
    return found


def evaluation_shows_the_anchor() -> tuple[bool, bool, bool]:
    model = DistributedDataParallel(small())
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), diloco(every_steps=5))
    start = flat(model).clone()
    for step in range(3):
        backward(model, dist.get_rank(), step)
        attached.step()
    live = flat(model).clone()
    with attached.evaluation():
        shown = flat(model).clone()
    return torch.equal(shown, start), torch.equal(flat(model), live), not torch.equal(live, start)


def overlap_and_a_second_backward(keep_zeros: bool) -> tuple[Tensor, Tensor]:
    mesh = build_mesh(2, 2)
    model, plain = small(), small()
    fully_shard(model, mesh=mesh.shard_mesh())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    attached = every_step().bind(pieces_of(model, optimizers[0], mesh.channel, overlap=True), 0)
    if keep_zeros:
        backward(model, dist.get_rank(), 5)
        attached.finish()
        optimizers[0].zero_grad(set_to_none=False)
    for step in range(2):  # synchronised both times: the second must not be added to what has not arrived yet
        backward(model, dist.get_rank(), step)
        for other in range(4):
            backward(plain, other, step)
    for parameter in plain.parameters():
        assert parameter.grad is not None
        parameter.grad /= 4
    attached.step()
    optimizers[1].step()
    return torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()]), flat(plain)  # type: ignore[attr-defined]


def refused(case: str) -> str:
    optimizer: torch.optim.Optimizer | None
    model: nn.Module = small()
    group: dist.ProcessGroup | None = dist.new_group([0, 1])
    if case == "no group":
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        group = None
    elif case == "the shard group":
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        group = mesh.get_group("shard")
    elif case == "shards within a plain module":
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model[0], mesh=mesh["shard"])  # type: ignore[index]
    elif case == "tensor parallel":
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model[0], mesh, ColwiseParallel())  # type: ignore[index]
    elif case == "a plain module of two ranks":
        group = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")).get_group("replicate")
    elif case == "sparse gradients":
        model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    elif case == "complex":
        model = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if case == "another model's optimizer":
        optimizer = torch.optim.SGD(small().parameters(), lr=0.1)
    if case in ("sparse gradients", "complex", "another model's optimizer"):
        model = DistributedDataParallel(model)
    if case == "no optimizer":
        model, optimizer = DistributedDataParallel(model), None
    if case == "DDP mixed precision":
        model = DistributedDataParallel(model, mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    sync = local_sgd(every_steps=2) if case == "a plain module of two ranks" else every_step()
    try:
        attach(model, optimizer, sync, replicate_group=group)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "attached"


def with_a_matrix_optimizer() -> str:
    model = DistributedDataParallel(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(model, optimizer, every_step())
    backward(model, dist.get_rank(), 0)
    attached.step()
    for parameter in model.parameters():
        optimizer.state[parameter]["factor"] = torch.zeros(2)
    try:
        attached.pieces.optimizer_state()
    except ValueError as error:
        return str(error)
    return ""


def a_step_that_bypasses_the_sync() -> str:
    model = DistributedDataParallel(small())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attached = attach(model, optimizer, every_step())
    backward(model, dist.get_rank(), 0)
    try:
        optimizer.step()
    except RuntimeError as error:
        attached.step()
        attached.detach()
        optimizer.step()  # it is the user's again
        return str(error)
    return ""


def loaded_in_the_wrong_order(order: str) -> str:
    """A resume in the middle of a round, with one thing done wrong."""

    def fresh() -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
        model = DistributedDataParallel(small())
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = fresh()
    attached = attach(model, optimizer, diloco(every_steps=3))
    for step in range(4):
        backward(model, dist.get_rank(), step)
        attached.step()
    saved = copy.deepcopy([model.state_dict(), attached.state_dict()])
    model, optimizer = fresh()
    if order == "attach last":
        model.load_state_dict(saved[0])
    again = attach(model, optimizer, diloco(every_steps=3))
    if order == "another rank's model":
        everybody: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everybody, saved[0])
        model.load_state_dict(everybody[(dist.get_rank() + 1) % len(everybody)])
    try:
        again.load_state_dict(saved[1])
    except ValueError as error:
        return str(error)
    return ""


class TwoHeads(nn.Module):
    """Uses one of its heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 3), nn.Linear(7, 3)
        self.chosen = self.first

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.chosen(x)
        return found


def residual_of_an_unused_head() -> tuple[Tensor, Tensor, bool]:
    """The second head's residual before and after steps without it, and whether its weights stood still."""
    net = TwoHeads()
    model = DistributedDataParallel(net, find_unused_parameters=True)
    sync = every_step(compress=error_feedback(topk(0.1)))
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), sync)

    def step(number: int, head: nn.Linear) -> None:
        net.chosen = head
        backward(model, dist.get_rank(), number)
        attached.step()

    step(0, net.second)
    before, weight = attached.state.tensors["second.weight"]["residual"].clone(), net.second.weight.detach().clone()
    for number in range(1, 4):
        step(number, net.first)
    return before, attached.state.tensors["second.weight"]["residual"], torch.equal(weight, net.second.weight)


def misused(case: str) -> str:
    """What is said to somebody who has done one thing wrong."""
    model = DistributedDataParallel(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        if case == "other ranks, other syncs":
            attach(model, optimizer, local_sgd(every_steps=3 + dist.get_rank()))
        if case == "another compressor's state":
            attached = attach(model, optimizer, every_step(compress=error_feedback(quantize(bits=8))))
            state = attached.state_dict()
            attached.detach()
            attach(model, optimizer, every_step(compress=error_feedback(topk(0.1)))).load_state_dict(state)
        if case == "no state":
            attach(model, optimizer, every_step()).load_state_dict({})
        if case == "a meaningless scale":
            attach(model, optimizer, every_step()).feedback.rescale(float("nan"))
        if case == "a hook of their own":
            model.register_comm_hook(None, fp16_compress_hook)
        if case == "not a sync":
            attach(model, optimizer, error_feedback(topk(0.1)))  # type: ignore[arg-type]
        sync = every_step(compress=error_feedback(topk(0.1))) if case == "another rank's state" else every_step()
        attached = attach(model, optimizer, diloco(every_steps=3) if case == "pretrained" else sync)
        if case == "pretrained":
            model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
        if case == "attached twice":
            attach(model, optimizer, every_step())
        if case == "all under no_sync":
            with model.no_sync():
                backward(model, dist.get_rank(), 0)
        else:
            backward(model, dist.get_rank(), 0)
        if case == "stepped after detach":
            attached.detach()
        if case == "another rank's state":
            states: list[dict[str, object]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(states, attached.state_dict())
            attached.load_state_dict(states[(dist.get_rank() + 1) % len(states)])
        attached.step()
        if case == "stepped twice":
            attached.step()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return ""


def closed_rounds() -> tuple[list[bool], Tensor, Tensor]:
    """What closing says in turn, and the model after it beside the anchor."""
    model = DistributedDataParallel(small())
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), diloco(every_steps=3))
    said = [attached.close_round()]
    for step in range(5):
        backward(model, dist.get_rank(), step)
        attached.step()
        if step in (2, 4):
            said.append(attached.close_round())
    said.append(attached.close_round())
    live = flat(model)
    with attached.evaluation():
        return said, live, flat(model)


class Odd(nn.Module):
    """What PyTorch's PowerSGD hook fails on: a number, an empty parameter, a matrix without a gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.nothing = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0, 3))
        self.first, self.later = nn.Linear(7, 24), nn.Parameter(torch.randn(24, 24))
        self.used = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found: Tensor = self.scale * (hidden + self.used * (hidden @ self.later)) + self.nothing.sum()
        return found


def low_rank_of_odd_things() -> tuple[Tensor, list[bool], bool]:
    """Parameters at the end, what each step said, and whether the matrix that came late was trained."""
    net = Odd()
    model = DistributedDataParallel(net)
    attached = attach(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), every_step(compress=error_feedback(powersgd(2)))
    )
    before, said = net.later.detach().clone(), []
    for step in range(6):
        net.used = float(step > 1)
        x = torch.full((5, 7), float("inf")) if step == 3 and dist.get_rank() == 1 else data(dist.get_rank(), step)[0]
        model(x).square().mean().backward()
        said.append(attached.step())
    return flat(model), said, not torch.equal(before, net.later.detach())


# --- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [dense_on_ddp_and_by_hand, no_sync_accumulates], ids=lambda job: str(job.__name__))
def test_equal_to_round_off(pool: WorkerPool, job: Callable[[], tuple[Tensor, Tensor]]) -> None:
    for mine, expected in pool.run(job):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_fsdp2_of_the_users_own_is_data_parallelism_and_clips_right(pool: WorkerPool, clip: float) -> None:
    for mine, expected in pool.run(dense_on_user_fsdp2, clip):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_ddp_leaves_gradients_alone_between_rounds_and_only_then(pool: WorkerPool) -> None:
    for before, under, after in pool.run(gradients_under_a_local_update, world=2):
        for left, own, mean in (before, after):
            torch.testing.assert_close(left, mean)
            assert not torch.allclose(left, own)
        assert torch.equal(under[0], under[1])


def test_replicas_are_made_equal_first(pool: WorkerPool) -> None:
    first, *others = pool.run(replicas_start_equal)
    assert torch.equal(first, flat(small(seed=0)))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kind", ["ef", "diloco"])
def test_state_dict_goes_through_weights_only_load_and_goes_on_bitwise(pool: WorkerPool, kind: str) -> None:
    for mine, resumed in pool.run(state_dict_round_trip, kind):
        assert torch.equal(mine, resumed)


def test_an_optimizer_that_is_stepped_past_its_sync_says_so(pool: WorkerPool) -> None:
    for message in pool.run(a_step_that_bypasses_the_sync, world=2):
        assert "call sync.step()" in message


@pytest.mark.parametrize("order", ["attach last", "another rank's model", "no model"])
def test_a_resume_in_the_wrong_order_is_refused(pool: WorkerPool, order: str) -> None:
    messages = pool.run(loaded_in_the_wrong_order, order, world=2)
    assert any("attach, then load" in message for message in messages)  # the broadcast gives replica 0 its own


def test_the_last_round_of_a_run_can_be_closed_early_and_once(pool: WorkerPool) -> None:
    answers = pool.run(closed_rounds, world=2)
    assert torch.equal(answers[0][1], answers[1][1])
    for said, live, anchor in answers:
        assert said == [False, False, True, False]
        assert torch.equal(live, anchor)


def test_a_parameter_that_nobody_used_keeps_its_residual(pool: WorkerPool) -> None:
    for before, after, stood in pool.run(residual_of_an_unused_head, world=2):
        assert bool(before.any()) and torch.equal(before, after) and stood


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("not a sync", "every_step(compress=...)"),
        ("pretrained", "load weights to start from before attach"),
        ("attached twice", "call its detach() first"),
        ("a hook of their own", "wrap the module in a new DistributedDataParallel"),
        ("all under no_sync", "outside of no_sync()"),
        ("stepped after detach", "detach() was called"),
        ("stepped twice", "no gradient was exchanged since the last sync.step()"),
        ("another rank's state", "every rank loads its own files"),
        ("other ranks, other syncs", "were given another sync, seed or model than this one"),
        ("another compressor's state", "take out its entry 'sync'"),
        ("no state", "the state of a sync is"),
        ("a meaningless scale", "the new scale over the old one"),
    ],
)
def test_misuse_is_told(pool: WorkerPool, case: str, words: str) -> None:
    for message in pool.run(misused, case, world=2):
        assert words in message


def test_low_rank_survives_what_pytorchs_hook_does_not(pool: WorkerPool) -> None:
    for found, said, trained in pool.run(low_rank_of_odd_things, world=2):
        assert said == [True, True, True, False, True, True]
        assert bool(torch.isfinite(found).all()) and trained


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_detach_gives_the_model_back_and_it_can_be_attached_again(pool: WorkerPool, kind: str) -> None:
    for mine, expected in pool.run(detached_and_attached_again, kind):
        torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-4)  # 8 bits in the last of three steps


def test_evaluation_swaps_the_anchor_in_and_back(pool: WorkerPool) -> None:
    assert all(all(answers) for answers in pool.run(evaluation_shows_the_anchor, world=2))


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_a_late_fill_loses_nothing_that_is_accumulated(pool: WorkerPool, keep_zeros: bool) -> None:
    for mine, expected in pool.run(overlap_and_a_second_backward, keep_zeros):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no group", "pass replicate_group"),
        ("no optimizer", "needs its optimizer"),
        ("DDP mixed precision", "takes the only communication hook"),
        ("plain module", "wrap it in DistributedDataParallel"),
        ("a plain module of two ranks", "is a plain module, of which each rank is a replica"),
        ("tensor parallel", "0.weight of this Sequential is a DTensor"),
        ("shards within a plain module", "of which 0 is a FSDPLinear"),
        ("the shard group", 'mesh.get_group("replicate")'),
        ("sparse gradients", "sparse=False"),
        ("complex", "torch.view_as_real"),
        ("another model's optimizer", "are not the model's"),
    ],
)
def test_what_cannot_be_attached_to_is_refused(pool: WorkerPool, case: str, words: str) -> None:
    for message in pool.run(refused, case, world=2):
        assert words in message


def test_an_optimizer_that_is_not_elementwise_is_named(pool: WorkerPool) -> None:
    for message in pool.run(with_a_matrix_optimizer, world=2):
        assert "only elementwise" in message
        assert "factor" in message
