"""What each engine holds in addition to activations, event by event of a description's trace.

Sources: torch 2.13 (nn/parallel/distributed.py, csrc/distributed/c10d/reducer.cpp, distributed/fsdp/_fully_shard),
DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py). `benchmarks/plan_memory.py` compares them with what torch's
trackers count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dtrain.plan.describe import Description, Event, Parameter
from dtrain.plan.ledger import Ledger
from dtrain.plan.placement import FP32, EngineMemory, Placement
from dtrain.plan.zero_memory import ZeroStage1, ZeroStage3, ZeroStage12


def trained(parameters: Iterable[Parameter]) -> int:
    """Elements of those that are trained."""
    return sum(parameter.numel for parameter in parameters if parameter.trained)


class DDPMemory:
    """Parameters, gradients and optimizer state in full. Gradients are views of DDP's buckets, which stay.

    A replica of one rank whose gradients stay there skips the buckets, and has gradients of its own beside them.
    """

    def __init__(self, model: Description, placement: Placement) -> None:
        self.model, self.placement = model, placement
        self._by_name = {parameter.fqn: parameter for parameter in model.parameters}
        self._reduced = placement.exchanged or placement.shards > 1

    def built(self, ledger: Ledger) -> None:
        ledger.add("parameters", FP32 * self.model.numel + self.model.buffer_bytes)
        ledger.add("gradients", FP32 * self.model.trained_numel)

    def on(self, event: Event, ledger: Ledger, *, first: bool, last: bool) -> None:
        if event.kind != "gradient":
            return
        size = FP32 * self._by_name[event.name].numel
        if not self._reduced or not last:
            ledger.add("gradients", size if first else 0)
        elif not first:
            ledger.add("gradients", -size)  # the sum so far goes into the bucket

    def before_optimizer(self, ledger: Ledger) -> None:
        pass

    def stepped_shapes(self) -> list[tuple[int, ...]]:
        return [parameter.shape for parameter in self.model.parameters if parameter.trained]

    def after_optimizer(self, ledger: Ledger) -> None:
        ledger.put("gradients", FP32 * self.model.trained_numel)


class FSDPMemory:
    """Shards of everything, and around its forward and backward pass a unit's whole parameters.

    The root's stay gathered from the beginning of forward to the end of backward. All-gathers go into a flat buffer,
    from which whole parameters are copied; in forward it lives until the next unit's copy, in backward the next unit's
    is filled ahead. Of whole gradients a flat copy is reduced, and lives until the next unit is reduced.
    """

    def __init__(self, model: Description, placement: Placement) -> None:
        self.model, self.placement = model, placement
        self.units: dict[str, list[Parameter]] = {}
        for parameter in model.parameters:
            self.units.setdefault(parameter.unit, []).append(parameter)
        self._forward = [event.name for event in model.trace if event.kind == "enter" and event.name in self.units]
        self._order = list(dict.fromkeys(self._forward))
        self._gathered: set[str] = set()
        self._buffer = 0  # of the last all-gather in forward
        self._ahead = ""  # the unit whose all-gather is under way in backward
        self._reduced = 0  # the flat copy of the last unit's gradients
        self._backward: set[str] = set()
        self._whole: dict[str, int] = {}  # gradients by unit
        self._done: set[str] = set()
        self._began = False
        self._by_name = {parameter.fqn: parameter for parameter in model.parameters}

    def built(self, ledger: Ledger) -> None:
        whole = FP32 * self.model.numel + self.model.buffer_bytes
        ledger.add("parameters", whole)  # built in full, then cut unit by unit
        for unit in self.units.values():
            for parameter in unit:
                ledger.add("parameters", FP32 * self._shard(parameter))
                ledger.add("parameters", -FP32 * parameter.numel)

    def on(self, event: Event, ledger: Ledger, *, first: bool, last: bool) -> None:
        if event.kind == "enter" and event.name in self.units and event.name not in self._backward:
            if not self._began or event.name not in self._gathered:
                self._unshard_forward(event.name, ledger)
        elif event.kind == "leave" and event.name in self.units and not self._backward:
            self._leave_forward(event.name, ledger)
        elif event.kind == "enter backward" and event.name in self.units:
            self._enter_backward(event.name, ledger)
        elif event.kind == "gradient":
            unit = self._by_name[event.name].unit
            if first or self.placement.bf16:  # else it is added in place to the sum so far
                ledger.add("unreduced gradients", event.bytes)
                self._whole[unit] = self._whole.get(unit, 0) + event.bytes
        elif event.kind == "leave backward" and event.name in self.units:
            if event.name == "":
                for name in [*self.units]:
                    if name not in self._done:
                        self._leave_backward(name, ledger, first, last)
                self._end_of_backward(ledger)
            elif event.name not in self._done:
                self._leave_backward(event.name, ledger, first, last)

    def before_optimizer(self, ledger: Ledger) -> None:
        pass

    def stepped_shapes(self) -> list[tuple[int, ...]]:
        shapes = []
        for parameter in self.model.parameters:
            if parameter.trained:
                rows = -(-parameter.shape[0] // self.placement.shards)
                shapes.append((rows, *parameter.shape[1:]))
        return shapes

    def after_optimizer(self, ledger: Ledger) -> None:
        ledger.put("gradients", 0)

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def _shard(self, parameter: Parameter) -> int:
        """Elements, padded: rank 0's part."""
        return -(-parameter.shape[0] // self.placement.shards) * (parameter.numel // max(1, parameter.shape[0]))

    def _padded(self, unit: str) -> int:
        return sum(self._shard(parameter) for parameter in self.units[unit]) * self.placement.shards

    def _padded_trained(self, unit: str) -> int:
        return sum(self._shard(parameter) for parameter in self.units[unit] if parameter.trained)

    def _gathered_bytes(self, unit: str) -> int:
        return self._padded(unit) * self._itemsize

    def _flat(self, unit: str) -> int:
        """Of the all-gather's buffer: with one shard there is none."""
        return self._gathered_bytes(unit) if self.placement.shards > 1 else 0

    @property
    def _itemsize(self) -> int:
        return 2 if self.placement.bf16 else FP32

    # ---- one unit --------------------------------------------------------------------------------------------------

    def _cast(self, unit: str, ledger: Ledger) -> int:
        """The shard in bf16, while it is copied into the buffer."""
        return self._gathered_bytes(unit) // self.placement.shards if self.placement.bf16 else 0

    def _unshard_forward(self, unit: str, ledger: Ledger) -> None:
        self._began = True
        ledger.add("gathered parameters", self._cast(unit, ledger))
        ledger.add("gathered parameters", self._flat(unit))
        ledger.add("gathered parameters", -self._cast(unit, ledger))
        ledger.add("gathered parameters", -self._buffer)
        self._buffer = self._flat(unit)
        ledger.add("gathered parameters", self._gathered_bytes(unit))
        self._gathered.add(unit)

    def _leave_forward(self, unit: str, ledger: Ledger) -> None:
        if unit == "":
            ledger.add("gathered parameters", -self._buffer)
            self._buffer = 0
        elif unit in self._gathered:
            ledger.add("gathered parameters", -self._gathered_bytes(unit))
            self._gathered.discard(unit)

    def _enter_backward(self, unit: str, ledger: Ledger) -> None:
        if unit == "" and self._buffer:
            ledger.add("gathered parameters", -self._buffer)
            self._buffer = 0
        self._backward.add(unit)
        if unit not in self._gathered:
            if self._ahead != unit:
                ledger.add("gathered parameters", self._flat(unit))
            ledger.add("gathered parameters", self._gathered_bytes(unit))
            ledger.add("gathered parameters", -self._flat(unit))
            self._gathered.add(unit)
        self._ahead = ""
        place = self._order.index(unit) if unit in self._order else 0
        before = [name for name in self._order[:place] if name not in self._gathered and name not in self._done]
        if unit == "":
            before = [name for name in self._order if name not in self._gathered]
        if before:
            self._ahead = before[-1]
            ledger.add("gathered parameters", self._cast(self._ahead, ledger))
            ledger.add("gathered parameters", self._flat(self._ahead))
            ledger.add("gathered parameters", -self._cast(self._ahead, ledger))

    def _leave_backward(self, unit: str, ledger: Ledger, first: bool, last: bool) -> None:
        self._done.add(unit)
        if self.placement.bf16 and not (first and last):
            self._sum_in_fp32(unit, ledger, first)
        if unit in self._gathered:
            ledger.add("gathered parameters", -self._gathered_bytes(unit))
            self._gathered.discard(unit)
        if not last:
            return
        ledger.add("unreduced gradients", -self._reduced)
        self._reduced = self._padded_trained(unit) * self.placement.shards * FP32
        ledger.add("unreduced gradients", self._reduced)
        ledger.add("unreduced gradients", -self._whole.pop(unit, 0))
        ledger.add("gradients", self._padded_trained(unit) * FP32)

    def _sum_in_fp32(self, unit: str, ledger: Ledger, first: bool) -> None:
        """Of several microbatches."""
        arrived = 2 * trained(self.units[unit])
        if first:
            ledger.add("unreduced gradients", 2 * arrived)
            self._whole[unit] = self._whole.get(unit, 0) + 2 * arrived
        ledger.add("unreduced gradients", -arrived)
        self._whole[unit] = self._whole.get(unit, 0) - arrived

    def _end_of_backward(self, ledger: Ledger) -> None:
        ledger.add("unreduced gradients", -self._reduced)
        self._reduced, self._began = 0, False
        self._backward, self._done, self._ahead = set(), set(), ""


ENGINES: Mapping[str, Callable[[Description, Placement], EngineMemory]] = {
    "ddp": DDPMemory, "fsdp": FSDPMemory, "zero1": ZeroStage1, "zero2": ZeroStage12, "zero3": ZeroStage3,
}  # fmt: skip
