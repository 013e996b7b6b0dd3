"""Optimizers that a sync does not know, or that do more than step: nothing is lost of them without a word."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step, local_sgd
from dtrain.comm.runtime.attached import Attached
from dtrain.compress import error_feedback, topk
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, sharded, small

pytestmark = pytest.mark.processes


def halves(net: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    first, second = net[0], net[2]  # type: ignore[index]
    return torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.SGD(second.parameters(), lr=0.1)


def whole(model: nn.Module) -> Tensor:
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def attached_in_silence(*arguments: Any, **options: Any) -> Attached:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attach(*arguments, **options)


def one_or_two_optimizers(engine: str, order: str) -> tuple[Tensor, Tensor, bool]:
    """Steps with feedback by one optimizer and by two, the second stepped by hand; what both end with."""
    found = []
    for optimizers in (1, 2):
        net = small()
        model, group = sharded(net) if engine == "fsdp" else (DistributedDataParallel(net), None)
        mine, other = halves(net)
        if optimizers == 1:
            mine = torch.optim.SGD(net.parameters(), lr=0.1)
        spec = every_step(compress=error_feedback(topk(0.1)))
        sync = attached_in_silence(model, mine, spec, replicate_group=group)
        for step in range(4):
            backward(model, dist.get_rank(), step)
            if optimizers == 2 and order == "before":
                other.step()
                other.zero_grad()
            sync.step()
            if optimizers == 2 and order == "after":
                other.step()
                other.zero_grad()
        found.append((whole(model), sync.state.tensors))
        sync.detach()
    (alone, kept), (beside, others) = found
    same = kept.keys() == others.keys() and all(torch.equal(kept[f]["residual"], others[f]["residual"]) for f in kept)
    return alone, beside, same


def a_second_optimizer_under_local_updates(engine: str, order: str, steps: int) -> tuple[int, str, Tensor]:
    """Steps that were made, what was said, and the model behind the last round."""
    net = small()
    group, model = None, cast(nn.Module, net if engine == "plain" else DistributedDataParallel(net))
    if engine == "fsdp":
        model, group = sharded(net)
    mine, other = halves(net)
    sync = attached_in_silence(model, mine, diloco(every_steps=2), replicate_group=group)
    said = ""
    try:
        for step in range(steps):
            backward(model, dist.get_rank(), step)
            if order == "before":
                other.step()
                other.zero_grad()
            sync.step()
            if order == "after":
                other.step()
                other.zero_grad()
        sync.close_round()
    except RuntimeError as error:
        said = str(error)
    return sync.steps, said, whole(model)


def cleared_by_mistake(engine: str) -> str:
    net = small()
    unused = engine == "ddp, unused"
    model, group = (
        sharded(net) if engine == "fsdp" else (DistributedDataParallel(net, find_unused_parameters=unused), None)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = attach(model, optimizer, every_step(compress=error_feedback(topk(0.1))), replicate_group=group)
    backward(model, dist.get_rank(), 0)
    optimizer.zero_grad()
    try:
        sync.step()
    except RuntimeError as error:
        return str(error)
    return ""


def nan_outside(engine: str) -> list[bool]:
    """What steps say, where a NaN gets into parameters that nobody steps or clears."""
    net = small()
    group, model = None, cast(nn.Module, DistributedDataParallel(net) if engine == "ddp" else net)
    if engine == "fsdp":
        model, group = sharded(net)
    sync = every_step() if engine != "plain" else local_sgd(every_steps=2)
    attached = attached_in_silence(model, torch.optim.SGD(net[2].parameters(), lr=0.01), sync, replicate_group=group)
    said = []
    for step in range(5):
        (model(torch.ones(4, 7)).square().mean() * (float("nan") if step == 1 else 1)).backward()
        said.append(attached.step())
    return said


class Sending(torch.optim.SGD):
    """Somebody's own optimizer, which keeps replicas equal."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                dist.broadcast(parameter.data, src=0)


def one_that_communicates(kind: str, sync_kind: str) -> tuple[bool, str]:
    """Whether its sync was attached, and what was said."""
    model = DistributedDataParallel(small())
    # Here: importing it warns of torch.jit.
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    optimizer: torch.optim.Optimizer
    if kind.startswith("zero"):
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    elif kind == "post local sgd":
        averager = torch.distributed.algorithms.model_averaging.averagers.PeriodicModelAverager(period=1)
        optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager)
    else:
        optimizer = Sending(model.parameters(), lr=0.1)
    attached = None
    try:
        given = [optimizer] if kind.endswith("in a list") else optimizer
        attached = attach(model, given, every_step() if sync_kind == "every_step" else diloco(every_steps=5))
        for step in range(2):
            backward(model, dist.get_rank(), step)
            attached.step()
    except (RuntimeError, ValueError, TypeError) as error:
        return attached is not None, str(error)
    return True, ""


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_feedback_keeps_what_a_second_optimizer_steps_with(pool: WorkerPool, engine: str, order: str) -> None:
    for alone, beside, same in pool.run(one_or_two_optimizers, engine, order):
        assert torch.equal(alone, beside) and same


@pytest.mark.parametrize("engine", ["plain", "ddp"])
def test_a_second_optimizer_belongs_between_backward_and_the_step_of_a_local_update(
    pool: WorkerPool, engine: str
) -> None:
    (steps, said, one), (_, _, other) = pool.run(a_second_optimizer_under_local_updates, engine, "before", 4, world=2)
    assert (steps, said) == (4, "") and torch.equal(one, other)
    for steps, said, _ in pool.run(a_second_optimizer_under_local_updates, engine, "after", 4, world=2):
        assert steps == 1 and "Step the other optimizer before sync.step()" in said
    for steps, said, _ in pool.run(a_second_optimizer_under_local_updates, engine, "after", 1, world=2):
        assert steps == 1 and "Step the other optimizer before sync.step()" in said  # by close_round()


def test_a_second_optimizer_beside_a_local_update_on_fsdp2(pool: WorkerPool) -> None:
    (steps, said, one), *others = pool.run(a_second_optimizer_under_local_updates, "fsdp", "before", 4)
    assert (steps, said) == (4, "") and all(torch.equal(one, other) for _, _, other in others)
    for steps, said, _ in pool.run(a_second_optimizer_under_local_updates, "fsdp", "after", 4):
        assert steps == 1 and "Step the other optimizer before sync.step()" in said


@pytest.mark.parametrize("engine", ["ddp", "ddp, unused", "fsdp"])
def test_gradients_that_were_cleared_before_the_step_are_missed(pool: WorkerPool, engine: str) -> None:
    for message in pool.run(cleared_by_mistake, engine):
        assert "zero_grad() came before sync.step()" in message


@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("plain", 2), ("fsdp", 4)])
def test_one_nan_costs_one_step_wherever_it_got(pool: WorkerPool, engine: str, world: int) -> None:
    assert pool.run(nan_outside, engine, world=world) == world * [[True, False, True, True, True]]


@pytest.mark.parametrize("kind", ["zero", "zero in a list", "post local sgd", "of their own"])
def test_nobody_else_communicates_under_a_local_update(pool: WorkerPool, kind: str) -> None:
    for attached, message in pool.run(one_that_communicates, kind, "diloco", world=2):
        assert "communicates in its steps" in message
        assert attached == (kind == "of their own")


def test_an_optimizer_that_shards_its_state_goes_with_every_step(pool: WorkerPool) -> None:
    assert pool.run(one_that_communicates, "zero", "every_step", world=2) == 2 * [(True, "")]
