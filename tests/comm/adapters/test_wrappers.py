"""What trainers put around models and optimizers: the same sync as without it, or a word that helps."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step
from dtrain.comm.adapters.wrappers import unwrapped_model, unwrapped_optimizer
from dtrain.compress import error_feedback, powersgd, quantize
from dtrain.plans import by_layer
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, flat, small


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As Accelerate's: an `Optimizer` whose constructor never ran."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


class _FabricOptimizer:
    """As Fabric's: its class is made anew, from itself and the optimizer's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
        self.__class__ = type(f"Fabric{type(optimizer).__name__}", (type(self), type(optimizer)), {})
        self._optimizer = optimizer


class LightningOptimizer(_FabricOptimizer):
    """As Lightning's, of the same make."""


class _FabricModule(nn.Module):
    def __init__(self, forward_module: nn.Module) -> None:
        super().__init__()
        self._forward_module = forward_module


class Duck:
    """Looks like an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups


@pytest.mark.parametrize("wrapper", [AcceleratedOptimizer, _FabricOptimizer, LightningOptimizer])
def test_an_optimizer_is_found_within_what_trainers_put_around_it(wrapper: Any) -> None:
    optimizer = torch.optim.AdamW(small().parameters())
    assert unwrapped_optimizer(wrapper(optimizer)) is optimizer
    assert unwrapped_optimizer(AcceleratedOptimizer(wrapper(optimizer))) is optimizer
    both = unwrapped_optimizer([wrapper(optimizer)])
    assert both is not None and both.param_groups == optimizer.param_groups


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: {"a": o}, "a dict of 1 optimizers"),
        (Duck, "wraps the optimizer in .inner, give that one"),
        (lambda o: 0.1, "attach got a float for an optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused_with_the_way_out(make: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        unwrapped_optimizer(make(torch.optim.SGD(small().parameters(), lr=0.1)))


def test_a_model_is_found_within_what_trainers_put_around_it() -> None:
    net = small()
    assert unwrapped_model(_FabricModule(torch.compile(net, backend="eager"))) is net  # type: ignore[arg-type]
    assert unwrapped_model(net) is net


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((every_step(),), "got the sync EveryStep.* where the optimizer belongs"),
        ((every_step(), torch.optim.SGD([nn.Parameter(torch.zeros(1))])), "the two are swapped"),
        ((torch.optim.SGD([nn.Parameter(torch.zeros(1))]),), "attach got no sync"),
    ],
)
def test_a_call_with_the_wrong_arguments_is_told_the_right_one(arguments: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        attach(small(), *arguments)


def compiled(kind: str) -> nn.Module:
    net = small()
    if kind == "within DDP":
        return DistributedDataParallel(torch.compile(net, backend="eager"))
    if kind == "around DDP":
        return torch.compile(DistributedDataParallel(net), backend="eager")  # type: ignore[return-value]
    if kind == "a submodule":
        net[0] = torch.compile(net[0], backend="eager")  # type: ignore[assignment]
    if kind == "checkpointed":
        net[0] = checkpoint_wrapper(net[0])
    return DistributedDataParallel(net)


def trained(kind: str) -> tuple[Tensor, list[str], list[Tensor], bool]:
    """The model after some steps, the names that its sync knows, what it keeps, and whether a plain run takes that."""
    plan = by_layer({"0.*": error_feedback(powersgd(2)), "*": error_feedback(quantize(bits=8))})
    model = compiled(kind)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = AcceleratedOptimizer(optimizer) if kind == "around DDP" else optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a pattern that matches nothing
        attached = attach(model, optimizer, every_step(compress=plan))
    for step in range(3):
        backward(model, dist.get_rank(), step)
        attached.step()
    state = attached.state_dict()
    weights = flat(model)
    kept = [t for named in attached.state.tensors.values() for t in named.values()]
    attached.detach()
    plain = DistributedDataParallel(small())
    again = attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1), every_step(compress=plan))
    with torch.no_grad():
        start = 0
        for parameter in plain.parameters():
            parameter.copy_(weights[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
    again.load_state_dict(state)
    return weights, list(attached.pieces.shapes), kept, again.steps == 3


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["within DDP", "around DDP", "a submodule", "checkpointed"])
def test_a_compiled_model_is_the_same_to_a_sync(pool: WorkerPool, kind: str) -> None:
    plain, wrapped = pool.run(trained, "plain", world=2), pool.run(trained, kind, world=2)
    for (weights, names, kept, _), (others, their_names, theirs, loads) in zip(plain, wrapped, strict=True):
        assert torch.equal(weights, others) and loads
        assert names == their_names == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert all(torch.equal(one, other) for one, other in zip(kept, theirs, strict=True))


def second_syncs() -> list[str]:
    """What is said to those who attach to a model, or to a part of it, twice."""
    net = small()
    attached = attach(net, torch.optim.SGD(net.parameters(), lr=0.1), diloco(every_steps=2))
    said = []
    for model in (net, net[0], DistributedDataParallel(net)):
        try:
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1), diloco(every_steps=2))
        except RuntimeError as error:
            said.append(str(error))
    attached.detach()
    attach(net, torch.optim.SGD(net.parameters(), lr=0.1), diloco(every_steps=2)).detach()
    return said


@pytest.mark.processes
def test_a_model_has_one_sync_whatever_steps_it(pool: WorkerPool) -> None:
    for said in pool.run(second_syncs, world=2):
        assert len(said) == 3
        first = re.compile(r"attached to this model already, to its parameter (0\.)?weight among others")
        assert all(first.search(text) for text in said)
