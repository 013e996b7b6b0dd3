"""The memory of one rank, by term: a description's trace, replayed under an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.torch_private import fake_tensors
from dtrain.plan.describe import Description
from dtrain.plan.engine_memory import ENGINES
from dtrain.plan.ledger import Ledger
from dtrain.plan.placement import EngineMemory, Placement
from dtrain.plan.storages import Storages
from dtrain.plan.sync_memory import NOTHING, SyncMemory


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. ``peak``: at most, in the phase ``during``; ``terms`` then, in bytes.

    ``resident``: between two steps. ``step``: the peak of forward, backward and optimizer, without building the model
    and the exchange between steps.
    """

    peak: int
    during: str
    terms: dict[str, int]
    resident: int
    step: int


@dataclass(frozen=True)
class OptimizerMemory:
    """Of an inner optimizer on one rank: what it keeps, and what a step allocates besides."""

    state: int
    temporaries: int


def optimizer_memory(
    factory: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    shapes: Sequence[tuple[int, ...]],
    *,
    together: bool = False,
) -> OptimizerMemory:
    """Of the optimizer that ``factory`` makes: two steps over fp32 parameters of these shapes, which take no memory.

    ``together``: as torch's optimizers step on GPUs unless they are told otherwise, all parameters at once (foreach).
    """
    with fake_tensors(), torch.device("cpu"):
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes if 0 not in shape]
        if not parameters:
            return OptimizerMemory(0, 0)
        return stepped(factory(parameters), parameters, together=together)


def stepped(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], *, together: bool = False
) -> OptimizerMemory:
    """`optimizer_memory` of ``optimizer`` over ``parameters``, under ``FakeTensorMode``."""
    for group in optimizer.param_groups if together else ():
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    storages = Storages()
    storages.ignore(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    storages.ignore(parameter.grad for parameter in parameters if parameter.grad is not None)
    with storages:
        optimizer.step()
        kept = storages.live
        storages.begin()
        optimizer.step()
    return OptimizerMemory(kept, storages.peak - kept)


def replayed(
    model: Description,
    engine: str,
    placement: Placement,
    optimizer: Callable[[Sequence[tuple[int, ...]]], OptimizerMemory],
    sync: SyncMemory = NOTHING,
) -> Memory:
    """One step of ``model`` under ``engine``, with all state there, as from the second step on.

    ``optimizer``: see `optimizer_memory`, for the shapes that the engine gives it.
    """
    ledger = Ledger()
    ledger.phase = "building the model"
    memory = ENGINES[engine](model, placement)
    memory.built(ledger)
    cost = optimizer(memory.stepped_shapes())
    ledger.add("optimizer state", cost.state)
    started = ledger.forget_peak()
    resident = ledger.total + sum(size for term, size in sync.beside.items() if term != "in flight")
    ledger.add("inputs", model.input_bytes * placement.microbatches)
    for term, size in sync.beside.items():
        ledger.add(term, 0 if term == "in flight" and sync.exchanges else size)
    _passes(model, memory, placement, ledger, sync.beside.get("in flight", 0) if sync.exchanges else 0)
    ledger.phase = "optimizer"
    memory.before_optimizer(ledger)
    ledger.spike("optimizer temporaries", cost.temporaries)
    memory.after_optimizer(ledger)
    step = ledger.peak
    ledger.restore_peak(started)
    ledger.phase = "exchange between steps"
    for term in sync.beside:
        ledger.put(term, 0)
    for term, size in sync.between.items():
        ledger.add(term, size)
    return Memory(ledger.peak, ledger.peak_during, dict(ledger.at_peak), resident, step)


def _passes(model: Description, memory: EngineMemory, placement: Placement, ledger: Ledger, in_flight: int) -> None:
    """Forward and backward passes of all microbatches. ``in_flight``: what the exchange of all gradients holds."""
    numels = {parameter.fqn: parameter.numel for parameter in model.parameters}
    for index in range(placement.microbatches):
        ledger.phase = "forward"
        first, last = index == 0, index == placement.microbatches - 1
        for event in model.trace:
            if event.kind == "enter backward" and event.name == "":
                ledger.phase = "backward"
            if event.kind == "work":
                ledger.put("activations", event.peak)
                ledger.put("activations", event.bytes)
                continue
            if event.kind == "gradient":
                ledger.add("activations", -event.peak)
                if last:
                    ledger.add("in flight", in_flight * numels[event.name] // model.trained_numel)
            memory.on(event, ledger, first=first, last=last)
    ledger.put("activations", 0)
