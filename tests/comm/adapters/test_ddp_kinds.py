"""DistributedDataParallel in the ways in which people build it, and what it is told where it cannot be served."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from dtrain import attach, diloco, every_step, post_local_sgd
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, topk
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, flat, small

pytestmark = pytest.mark.processes


class Mixed(nn.Module):
    """Parameters of two dtypes: two buckets from the first step on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(7, 9).bfloat16(), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x.bfloat16()).float())
        return found


class Looked(nn.Module):
    """An embedding whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(50, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.words(x))
        return found


class Partly(nn.Module):
    """Leaves a part unused; in buckets of its own, if there are some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.idle = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.used(x)
        return found


def static_and_not(make: Callable[[], nn.Module], sync: str) -> tuple[Tensor, Tensor]:
    """The same training with a static graph and without one."""
    found = []
    for static in (True, False):
        model = DDP(make(), static_graph=static)
        attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), SYNCS[sync]())
        for step in range(4):
            backward(model, dist.get_rank(), step)
            attached.step()
        attached.close_round()
        found.append(flat(model))
        attached.detach()
    return found[0], found[1]


SYNCS: dict[str, Callable[[], Sync]] = {
    "every step": every_step,
    "feedback": lambda: every_step(compress=error_feedback(topk(0.1))),
    "diloco": lambda: diloco(every_steps=2),
    "post local sgd": lambda: post_local_sgd(every_steps=2, warmup_steps=1),
}


def uneven(sync: str, throw: bool) -> str:
    """Batches of 3 and 4, within join."""
    model = DDP(small())
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), SYNCS[sync]())
    try:
        with model.join(throw_on_early_termination=throw):
            for step in range(3 + dist.get_rank()):
                backward(model, dist.get_rank(), step)
                attached.step()
    except RuntimeError as error:
        return str(error)
    return ""


def said_of(case: str) -> str:
    net: nn.Module = Partly()
    options: dict[str, object] = {"bucket_cap_mb": 1e-5} if case == "unused, many buckets" else {}
    if case == "ignored":
        DDP._set_params_and_buffers_to_ignore_for_model(net, ["idle.weight", "idle.bias"])
    if case == "frozen when built":
        net = small()
        net[0].requires_grad_(False)
    model = DDP(net, **options)  # type: ignore[arg-type]
    if case == "frozen when built":
        net[0].requires_grad_(True)  # type: ignore[index]
    try:
        attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step())
        with model.no_sync() if case == "no_sync" else contextlib.nullcontext():
            backward(model, dist.get_rank(), 0)
        attached.step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def sparse(around: str, sync: str) -> tuple[str, bool]:
    """What was said, and whether replicas are equal behind a round and words have moved."""
    net = Looked()
    before = net.words.weight.detach().clone()
    model = DDP(net) if around == "ddp" else net
    try:
        attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), SYNCS[sync]())
    except ValueError as error:
        return str(error), False
    for step in range(4):
        words = torch.randint(50, (6,), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(words).square().mean().backward()
        attached.step()
    both = [torch.zeros_like(flat(net)) for _ in range(2)]
    dist.all_gather(both, flat(net))
    return "", torch.equal(*both) and not torch.equal(before, net.words.weight)


def ended_early() -> str:
    """Rank 1 makes a step less, and goes."""
    model = DDP(small())
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step())
    try:
        for step in range(3 - dist.get_rank()):
            backward(model, dist.get_rank(), step)
            attached.step()
    except RuntimeError as error:
        return str(error)
    attached.detach()
    return ""


@pytest.mark.parametrize("sync", sorted(SYNCS))
@pytest.mark.parametrize("make", [small, Mixed])
def test_a_static_graph_trains_as_any_other(pool: WorkerPool, make: Callable[[], nn.Module], sync: str) -> None:
    for static, other in pool.run(static_and_not, make, sync, world=2):
        assert torch.equal(static, other)


@pytest.mark.parametrize("sync", ["diloco", "post local sgd"])
def test_local_updates_refuse_ranks_that_make_different_numbers_of_steps(pool: WorkerPool, sync: str) -> None:
    for message in pool.run(uneven, sync, False, world=2, seconds=20):
        assert "the rounds of a local update are counted in steps" in message
    for message in pool.run(uneven, "diloco", True, world=2, seconds=20):
        assert "exhausted" in message


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unused", "find_unused_parameters=True"),
        ("unused, many buckets", "find_unused_parameters=True"),
        ("frozen when built", "wrap the module in a new one"),
        ("ignored", "was told to ignore idle.bias, idle.weight"),
    ],
)
def test_gradients_that_ddp_keeps_back_are_missed(pool: WorkerPool, case: str, words: str) -> None:
    for message in pool.run(said_of, case, world=2):
        assert words in message


@pytest.mark.parametrize("around", ["plain", "ddp"])
def test_sparse_gradients_are_served_where_none_is_exchanged(pool: WorkerPool, around: str) -> None:
    assert pool.run(sparse, around, "diloco", world=2) == 2 * [("", True)]


@pytest.mark.parametrize("sync", ["every step", "post local sgd"])
def test_sparse_gradients_are_refused_where_they_are_exchanged(pool: WorkerPool, sync: str) -> None:
    for message, _ in pool.run(sparse, "ddp", sync, world=2):
        assert "build it with sparse=False" in message


def test_a_rank_that_ends_early_is_named_as_what_it_is() -> None:
    with WorkerPool(2) as fresh:
        staying, _ = fresh.run(ended_early, world=2, seconds=50)
    assert "do all ranks make the same number of steps?" in staying
