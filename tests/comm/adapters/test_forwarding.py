"""``optimizer.step()`` as the step of a sync: what trainers do with it gives what ``sync.step()`` gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from dtrain import attach, diloco, every_step, streaming_diloco
from dtrain.comm.adapters.optimizer import StepGuard
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize
from dtrain.inner import chain
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, flat, sharded, small

SPECS: dict[str, Sync] = {
    "int8": every_step(compress=error_feedback(quantize(bits=8, block=16))),
    "diloco": diloco(every_steps=3),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=2, layers_per_fragment=0),
}
NEITHER = ("plain", "int8")
"""A plain module exchanges no gradients."""


def lowered(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.9**step)


class OneRank:
    """A parameter whose optimizers are forwarded, and how often the sync was asked to step."""

    def __init__(self, optimizers: int = 1, **options: Any) -> None:
        self.parameters = [nn.Parameter(torch.zeros(3)) for _ in range(optimizers)]
        self.optimizers: list[torch.optim.Optimizer] = [AdamW([p], lr=0.1, **options) for p in self.parameters]
        self.whole = self.optimizers[0] if optimizers == 1 else chain(*self.optimizers)
        self.guard, self.steps = StepGuard(self.whole), 0

    def forward(self) -> None:
        self.guard.forward(self.optimizers, self._step)

    def _step(self) -> bool:
        self.steps += 1
        with self.guard.opened():
            self.whole.step()
        self.whole.zero_grad()
        return True

    def backward(self) -> None:
        for number, parameter in enumerate(self.parameters):
            (parameter - number - 1).square().sum().backward()


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_made_before_and_after_see_the_steps(before: bool) -> None:
    one = OneRank()
    scheduler = lowered(one.optimizers[0]) if before else None
    one.forward()
    scheduler = scheduler or lowered(one.optimizers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            one.backward()
            one.optimizers[0].step()
            scheduler.step()
    assert one.steps == 3 and scheduler.get_last_lr() == pytest.approx([0.1 * 0.9**3])
    one.guard.remove()
    one.backward()
    one.optimizers[0].step()
    scheduler.step()
    assert one.steps == 3 and float(one.parameters[0].detach().abs().sum()) > 0


def test_a_closure_is_called_once_with_gradients_on() -> None:
    one, calls = OneRank(), []
    one.forward()

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        one.backward()
        return 7.0

    with torch.no_grad():
        assert one.optimizers[0].step(closure) == 7.0
        assert one.optimizers[0].step(closure=closure) == 7.0
    assert calls == [True, True] and one.steps == 2


def test_the_optimizer_is_what_it_was_after_the_end() -> None:
    one = OneRank()
    before = dict(vars(one.optimizers[0]))
    one.forward()
    assert "step" in vars(one.optimizers[0])
    one.guard.remove()
    assert {**before, "_opt_called": None}.keys() >= vars(one.optimizers[0]).keys()


def test_of_several_the_last_one_steps_all_as_they_were_asked() -> None:
    """Each with its scheduler at once, or all schedulers behind: bitwise the same."""
    ends = []
    for interleaved in (True, False):
        two = OneRank(2)
        two.forward()
        schedulers = [lowered(optimizer) for optimizer in two.optimizers]
        for _ in range(4):
            two.backward()
            for optimizer, scheduler in zip(two.optimizers, schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                if interleaved:
                    scheduler.step()
            for scheduler in () if interleaved else schedulers:
                scheduler.step()
        assert two.steps == 4
        ends.append(torch.cat([p.detach() for p in two.parameters]))
        assert all(group["lr"] == pytest.approx(0.1 * 0.9**4) for group in two.whole.param_groups)
    assert torch.equal(*ends)


def test_a_rate_that_is_a_tensor_is_kept_as_it_was_asked() -> None:
    two = OneRank(2)
    for group in two.whole.param_groups:
        group["lr"] = torch.tensor(0.1)
    two.forward()
    two.backward()
    two.optimizers[0].step()
    two.optimizers[0].param_groups[0]["lr"].fill_(0.0)
    two.optimizers[1].step()
    assert float(two.parameters[0].detach().abs().min()) > 0
    assert float(two.optimizers[0].param_groups[0]["lr"]) == 0.0


def test_one_that_is_stepped_twice_in_a_row_is_refused() -> None:
    two = OneRank(2)
    two.forward()
    two.backward()
    two.optimizers[1].step()
    with pytest.raises(RuntimeError, match="was stepped twice, and another optimizer of the same sync not yet"):
        two.optimizers[1].step()


# ---- in processes ---------------------------------------------------------------------------------------------------


def by_hand_or_forwarded(kind: str, name: str, closure: bool) -> list[bool]:
    """Whether training by ``optimizer.step()`` ends bitwise where ``sync.step()`` does."""
    return [torch.equal(*(_trained(kind, name, forward, closure) for forward in (False, True)))]


def _trained(kind: str, name: str, forward: bool, closure: bool) -> Tensor:
    net = small()
    group, model = None, cast(nn.Module, net if kind == "plain" else DistributedDataParallel(net))
    if kind == "fsdp":
        model, group = sharded(net)
    optimizers = [AdamW(net[0].parameters(), lr=0.02), SGD(net[2].parameters(), lr=0.1, momentum=0.9)]
    sync = attach(model, optimizers, SPECS[name], replicate_group=group, forward_steps=forward)
    for step in range(9):

        def loss(step: int = step) -> float:
            backward(model, dist.get_rank(), step)
            return 0.0

        if not forward:
            loss()
            sync.step()
        elif closure:
            optimizers[0].step(lambda: 0.0)
            optimizers[1].step(loss)
        else:
            loss()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert sync.steps == 9
    sync.close_round()
    sync.detach()
    return (
        flat(net) if kind != "fsdp" else torch.cat([cast(Any, p).full_tensor().reshape(-1) for p in net.parameters()])
    )


def skipped_alike() -> list[tuple[int, int]]:
    """After each step of a rank with an infinite gradient in step 1: skipped in a row, by what a trainer can see."""
    model = DistributedDataParallel(small())
    optimizer = SGD(model.parameters(), lr=0.1)
    sync = attach(model, optimizer, every_step(), forward_steps=True)
    seen = []
    for step in range(3):
        broken = float("inf") if step == dist.get_rank() == 1 else 1.0
        (model(torch.ones(4, 7)).square().mean() * broken).backward()
        optimizer.step()
        seen.append((sync.skipped_in_a_row, sync.skipped))
    return seen


def a_dry_step_of_dcp() -> tuple[int, list[str]]:
    """Loading an optimizer's state by torch's functions makes a step that only creates it."""
    model = DistributedDataParallel(small())
    optimizers = [AdamW(cast(Any, model.module)[0].parameters()), AdamW(cast(Any, model.module)[2].parameters())]
    sync = attach(model, optimizers, every_step(), forward_steps=True)
    state = get_optimizer_state_dict(model, optimizers)
    return sync.steps, [*cast(dict[str, Any], state["state"])]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in ("ddp", "plain", "fsdp") for n in SPECS if (k, n) != NEITHER]
)
@pytest.mark.parametrize("closure", [True, False])
def test_forwarded_is_by_hand(pool: WorkerPool, kind: str, name: str, closure: bool) -> None:
    world = 4 if kind == "fsdp" else 2
    assert pool.run(by_hand_or_forwarded, kind, name, closure, world=world) == [[True]] * world


@pytest.mark.processes
@pytest.mark.parametrize(
    ("question", "answer"),
    [(skipped_alike, [(0, 0), (1, 1), (0, 1)]), (a_dry_step_of_dcp, (0, ["0.weight", "0.bias", "2.weight", "2.bias"]))],
)
def test_in_processes(pool: WorkerPool, question: Callable[[], object], answer: object) -> None:
    assert pool.run(question, world=2) == [answer] * 2
