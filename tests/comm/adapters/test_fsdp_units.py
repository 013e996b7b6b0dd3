"""FSDP2's units: whichever of them the replicas run, in whichever order, gradients meet those of the same name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from dtrain import attach, diloco, every_step
from dtrain.comm.adapters.adapter import pieces_of
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.two_phase import two_phase
from dtrain.comm.feedback import as_compression
from dtrain.comm.ops import Place
from dtrain.comm.runtime.method import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import error_feedback, powersgd, quantize
from dtrain.testing import WorkerPool
from dtrain.train.mesh import build_mesh

pytestmark = pytest.mark.processes

WIDTH = 5
Path = tuple[str, ...]
"""The layers that a replica runs in a step, one behind the other."""


class Paths(nn.Module):
    """Layers of different sizes, each a unit of FSDP2; which of them run is the caller's choice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.a = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.stem = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        for name in path:
            layer = getattr(self, name.removeprefix("again "))
            inner = checkpoint(layer, x, use_reentrant=True) if name.startswith("again ") else layer(x)
            x = torch.tanh(inner)
        return x.square().mean()


def sharded(model: Paths, replicas: int) -> tuple[Paths, dist.ProcessGroup]:
    shards = dist.get_world_size() // replicas
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    for layer in model.children():
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model, mesh.get_group("replicate")


def inputs(replica: int, step: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * replica + step))


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {fqn: p.full_tensor().detach().clone() for fqn, p in model.named_parameters()}  # type: ignore[attr-defined]


def trained(
    spec: Sync,
    steps: Sequence[Sequence[Sequence[Path]]],
    *,
    replicas: int = 2,
    flag: bool = False,
    clip: float = 0.0,
    each: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model, and what it ought to be. ``steps``: for each step and replica the paths of its microbatches.

    ``each``: exchange after each microbatch, not only after a step's last. ``flag``: torch's, for unused parameters.
    """
    replica = dist.get_rank() // (dist.get_world_size() // replicas)
    model, peers = sharded(Paths(), replicas)
    plain = Paths()
    if flag:
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (model, plain)]
    attached = attach(model, optimizers[0], spec, replicate_group=peers)
    for number, paths in enumerate(steps):
        for micro, path in enumerate(paths[replica]):
            model.set_requires_gradient_sync(each or micro == len(paths[replica]) - 1)  # type: ignore[operator]
            if path:
                (model(inputs(replica, number), path) / len(paths[replica])).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        assert attached.step()
        for other, its in enumerate(paths):
            for path in its:
                if path:
                    (plain(inputs(other, number), path) / len(its) / replicas).backward()
        if flag:  # torch counts what has run before as used from then on
            for parameter in plain.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if clip:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizers[1].step()
        optimizers[1].zero_grad()
    attached.detach()
    return whole(model), {fqn: p.detach() for fqn, p in plain.named_parameters()}


A: Path = ("stem", "a", "head")
B: Path = ("stem", "b", "head")
BOTH: Path = ("stem", "a", "b", "head")
SWAPPED: Path = ("stem", "b", "a", "head")
NONE: Path = ()
CASES: dict[str, Sequence[Sequence[Sequence[Path]]]] = {
    "experts": [[[A], [B]]] * 3,
    "experts in turn": [[[A], [B]], [[B], [A]], [[A], [A]], [[B], [BOTH]]],
    "the same in another order": [[[BOTH], [SWAPPED]]] * 3,
    "one that nobody runs": [[[A], [A]], [[B], [B]], [[A], [A]], [[BOTH], [A]], [[B], [B]]],
    "one that nobody runs at first": [[[A], [A]], [[A], [A]], [[A], [BOTH]], [[A], [BOTH]], [[A], [A]]],
    "called twice by one": [[[("stem", "b", "b", "head")], [B]]] * 3,
    "called often by all": [[[("stem", "b", "a", "b", "b", "head")], [("stem", "b", "b", "b", "head")]]] * 3,
    "in reentrant checkpoints": [[[("stem", "again b", "again a", "head")], [("again b", "head")]]] * 3,
    "microbatches": [[[A, B], [B, A]]] * 2 + [[[A, A], [B, B]]] * 2 + [[[B], [A, BOTH]]],
    "a replica that runs nothing": [[[BOTH], [BOTH]], [[A], [NONE]], [[NONE], [B]], [[BOTH], [BOTH]]],
}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for fqn, value in wanted.items():
        torch.testing.assert_close({fqn: found[fqn]}, {fqn: value}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_replicas_step_with_the_mean_of_what_each_has_run(pool: WorkerPool, name: str) -> None:
    clip = 0.0 if "nothing" in name else 0.01
    results = pool.run(_trained, name, clip, world=2)
    for found, wanted in results:
        assert all(torch.equal(found[fqn], results[0][0][fqn]) for fqn in found)
        close(found, wanted)


def _trained(name: str, clip: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(every_step(), CASES[name], clip=clip)


METHODS: dict[str, Callable[[], Sync]] = {
    "all-reduce": lambda: every_step(route="all_reduce"),
    "warm-up": lambda: diloco(every_steps=50, warmup_steps=50),
    "lossless": lambda: every_step(lossless=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_so_does_everything_that_takes_the_mean(pool: WorkerPool, method: str) -> None:
    for name in ("experts in turn", "one that nobody runs"):
        for found, wanted in pool.run(_by_method, method, name, world=2):
            close(found, wanted)


def _by_method(method: str, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(METHODS[method](), CASES[name])


def test_with_shards_and_empty_ones(pool: WorkerPool) -> None:
    for name in ("experts in turn", "one that nobody runs"):
        results = pool.run(_by_method_of_shards, name, world=4)
        for found, wanted in results:
            close(found, wanted)


def _by_method_of_shards(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(every_step(), CASES[name], clip=0.01)


def test_with_zeros_for_what_torch_calls_unused(pool: WorkerPool) -> None:
    """`set_reduce_scatter_unused_params` makes zeros of what ran once before, and of nothing else."""
    steps: list[list[list[Path]]] = [[[BOTH], [BOTH]], [[A], [B]], [[B], [A]]]
    for found, wanted in pool.run(_flagged, steps, world=2):
        close(found, wanted)


def test_several_passes_in_a_step(pool: WorkerPool) -> None:
    for found, wanted in pool.run(_each_exchanged, world=2):
        close(found, wanted)


def _each_exchanged() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(every_step(), [[[A, B], [B, A]], [[A, B], [A, B]], [[BOTH, A], [B, B]]], clip=0.01, each=True)


def _flagged(steps: list[list[list[Path]]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(every_step(), steps, flag=True)


def _compressed(name: str, method: str) -> dict[str, Tensor]:
    compress = error_feedback(quantize(bits=4, block=8) if method == "int4" else powersgd(rank=1))
    return trained(every_step(compress=compress), CASES[name])[0]


@pytest.mark.parametrize("method", ["int4", "powersgd"])
def test_replicas_stay_equal_whatever_is_sent(pool: WorkerPool, method: str) -> None:
    for name in ("experts in turn", "called often by all", "one that nobody runs"):
        one, other = pool.run(_compressed, name, method, world=2)
        assert all(torch.equal(one[fqn], other[fqn]) for fqn in one)


def in_the_background(bf16: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same steps, waited for in each hook or only before the optimizer."""
    replica, results = dist.get_rank(), []
    for overlap in (False, True):
        model, _ = sharded(Paths().to(torch.bfloat16) if bf16 else Paths(), 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        mesh = build_mesh(2, 1)
        pieces = pieces_of(model, optimizer, mesh.channel, overlap=overlap)
        attached = every_step().bind(pieces, 0)
        for number, paths in enumerate([*CASES["experts in turn"], *CASES["called often by all"]]):
            for path in paths[replica]:
                model(inputs(replica, number).to(torch.bfloat16 if bf16 else torch.float32), path).backward()
            assert attached.step()
        attached.detach()
        results.append(whole(model))
    return results[0], results[1]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_in_the_background_is_the_same_to_the_bit(pool: WorkerPool, bf16: bool) -> None:
    for waited, behind in pool.run(in_the_background, bf16, world=2):
        assert all(torch.equal(waited[fqn], behind[fqn]) for fqn in waited)


def set_out(steps: int) -> list[list[int]]:
    """For each step how many units had been handed over when each exchange began. The model runs against its order."""
    model, peers = sharded(Paths(), 2)
    attached = attach(model, torch.optim.SGD(model.parameters()), every_step(), replicate_group=peers)
    channel, passes, seen = attached.pieces.channel, attached.pieces._passes, []  # type: ignore[attr-defined]
    start = channel.start

    def noted(flow: object, label: str, *more: object) -> object:
        if label == "gradients":
            seen.append(len(passes._arrivals))
        return start(flow, label, *more)  # type: ignore[arg-type]

    channel.start = noted  # type: ignore[method-assign,assignment]
    told = []
    for step in range(steps):
        model(inputs(dist.get_rank(), step), ("a", "head", "stem", "b", "head")).backward()
        attached.step()
        told.append(list(seen))
        seen.clear()
    return told


def test_nothing_waits_where_all_run_the_same(pool: WorkerPool) -> None:
    first, *later = pool.run(set_out, 4, world=2)[0]
    assert first != later[0], "the model was to run against the order of its modules"
    assert later == [[1, 2, 3, 4]] * 3


def test_values_of_different_names_are_never_combined() -> None:
    """Whoever pairs them: all replicas say what each came with."""
    names = (["up.weight", "up.bias"], ["up.weight", "up.bias"], ["down.weight", "down.bias"])
    for keys, told in (((3, 3, 3), "replica 2 of step 3, 2 values: down.weight"), ((3, 4, 3), "replica 1 of step 4")):
        flows = [
            two_phase(
                {name: torch.ones(4) for name in names[rank if told.startswith("replica 2") else 0]},
                as_compression(None), rank_order_mean, Place(rank, 3), Key(0, keys[rank], rank), State({}),
            )
            for rank in range(3)
        ]  # fmt: skip
        with pytest.raises(RuntimeError, match=told):
            simulate(flows)
