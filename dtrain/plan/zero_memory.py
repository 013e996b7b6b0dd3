"""What DeepSpeed ZeRO 1, 2 and 3 hold in addition to activations, on shard 0.

Source: DeepSpeed 0.19: runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py and
partitioned_param_coordinator.py, with the settings of `dtrain.train.engines.zero`.
"""

from __future__ import annotations

from collections import deque

from dtrain.plan.describe import Description, Event, Parameter
from dtrain.plan.ledger import Ledger
from dtrain.plan.placement import FP32, Placement

PERSISTENT = 10_000
"""Elements up to which stage 3 keeps a parameter whole: ``stage3_param_persistence_threshold``."""
PREFETCH, MOST_LIVE, REUSE = 50_000_000, 1_000_000_000, 1_000_000_000
"""Elements: DeepSpeed's defaults of prefetch_bucket_size, max_live_parameters and max_reuse_distance."""


class _Zero:
    """What the stages share."""

    def __init__(self, model: Description, placement: Placement) -> None:
        self.model, self.placement = model, placement
        self.by_name = {parameter.fqn: parameter for parameter in model.parameters}
        self.trained = [parameter for parameter in model.parameters if parameter.trained]
        self.itemsize = 2 if placement.bf16 else FP32
        self.bucket = max(1, int(placement.bucket_mib * 2**20 / 8)) * 2
        self.filled = 0

    @property
    def partition(self) -> int:
        """Elements of the trained parameters on this rank."""
        return -(-sum(parameter.numel for parameter in self.trained) // self.placement.shards)

    @property
    def whole(self) -> int:
        """Bytes of the model as it computes."""
        return self.itemsize * self.model.numel + self.model.buffer_bytes

    def stepped_shapes(self) -> list[tuple[int, ...]]:
        return [(self.partition,)]

    def _norm(self, parameters: list[Parameter], parts: int, ledger: Ledger) -> None:
        """Norms are taken of a copy in double precision, one gradient after the other."""
        largest = max((parameter.numel for parameter in parameters), default=0)
        ledger.spike("optimizer temporaries", 8 * -(-largest // parts))


class ZeroStage12:
    """Stages 1 and 2: the model whole on each rank, fp32 master copies and optimizer state of one part.

    Gradients go through a bucket of fixed size; what belongs to this rank is copied out of it. Stage 1 waits for the
    end of backward, stage 2 does it while gradients come.
    """

    stage = 2

    def __init__(self, model: Description, placement: Placement) -> None:
        self.zero = _Zero(model, placement)
        begin, self._mine = 0, set[str]()
        for parameter in self.zero.trained:
            if begin < self.zero.partition:
                self._mine.add(parameter.fqn)
            begin += parameter.numel
        self._compact = placement.bf16 and self.stage == 2
        self._waiting: list[str] = []
        self._oversized = 0
        self._begun = False
        self._owned = 0  # bytes of the copies of this rank's gradients in this microbatch

    def built(self, ledger: Ledger) -> None:
        zero = self.zero
        ledger.add("parameters", FP32 * zero.model.numel + zero.model.buffer_bytes)
        ledger.put("parameters", zero.whole)
        ledger.spike("parameters", zero.itemsize * sum(parameter.numel for parameter in zero.trained))  # flattened
        ledger.add("master copies", FP32 * zero.partition)

    def on(self, event: Event, ledger: Ledger, *, first: bool, last: bool) -> None:
        zero = self.zero
        reduces = self.stage == 2 or last
        if event.kind == "gradient":
            if not self._begun:
                ledger.add("unreduced gradients", zero.bucket * zero.itemsize)
                self._begun = True
            if self.stage == 1:
                ledger.add("unreduced gradients", event.bytes if first else 0)
            else:
                ledger.add("unreduced gradients", event.bytes)
                self._into_bucket(event.name, ledger)
        elif event.kind == "leave backward" and event.name == "" and reduces:
            if self.stage == 1:
                for parameter in zero.trained:
                    self._into_bucket(parameter.fqn, ledger)
            self._reduce(ledger)
            ledger.add("unreduced gradients", -zero.bucket * zero.itemsize)
            if not first and not self._compact and self.stage == 2:
                ledger.add("gradients", -self._owned)  # added to those of earlier microbatches
            self._owned, self._begun = 0, False

    def before_optimizer(self, ledger: Ledger) -> None:
        zero = self.zero
        self.zero._norm([zero.by_name[name] for name in self._mine], 1, ledger)
        if self._compact:
            return
        flat = zero.partition
        ledger.add("gradients", flat * zero.itemsize)
        if zero.placement.bf16:
            ledger.add("gradients", flat * FP32)
        ledger.put("gradients", flat * FP32)

    def stepped_shapes(self) -> list[tuple[int, ...]]:
        return self.zero.stepped_shapes()

    def after_optimizer(self, ledger: Ledger) -> None:
        ledger.put("gradients", 0)

    def _into_bucket(self, name: str, ledger: Ledger) -> None:
        zero, numel = self.zero, self.zero.by_name[name].numel
        if zero.filled + numel > zero.bucket:
            self._reduce(ledger)
        zero.filled += numel
        self._waiting.append(name)
        if numel > zero.bucket:
            self._oversized += numel * zero.itemsize
        else:
            ledger.add("unreduced gradients", -numel * zero.itemsize)

    def _reduce(self, ledger: Ledger) -> None:
        zero = self.zero
        if self._compact and not ledger.now("gradients"):
            ledger.add("gradients", zero.partition * FP32)
        elif not self._compact and not self._owned and self._mine.intersection(self._waiting):
            self._owned = zero.itemsize * sum(zero.by_name[name].numel for name in self._mine)
            ledger.add("gradients", self._owned)
        ledger.add("unreduced gradients", -self._oversized)
        zero.filled, self._oversized, self._waiting = 0, 0, []


class ZeroStage1(ZeroStage12):
    """See `ZeroStage12`."""

    stage = 1


class ZeroStage3:
    """Stage 3: parts of everything; parameters are gathered module by module, and ahead by up to 50 million elements.

    Those gathered at once share a flat buffer, which lives until the last of them is used. A parameter stays gathered
    where it is used again within a billion elements: models of up to that size are whole during a step. Parts of the
    gradients, and their bucket, stay from step to step.
    """

    def __init__(self, model: Description, placement: Placement) -> None:
        self.zero = _Zero(model, placement)
        self._uses = self._order_of_use()
        self._available: set[str] = set()
        self._inflight: dict[str, list[str]] = {}
        self._flat: dict[int, tuple[int, set[str]]] = {}
        self._queue: deque[str] = deque()
        self._step = 0
        self._small = {parameter.fqn for parameter in model.parameters if parameter.numel <= PERSISTENT}

    def built(self, ledger: Ledger) -> None:
        zero = self.zero
        ledger.add("parameters", FP32 * zero.model.numel + zero.model.buffer_bytes)
        small = sum(zero.by_name[name].numel for name in self._small)
        own = sum(self._part(parameter) for parameter in zero.model.parameters)
        ledger.put("parameters", zero.itemsize * (own + small) + zero.model.buffer_bytes)
        ledger.add("master copies", FP32 * zero.partition)
        ledger.add("gradients", FP32 * zero.partition + zero.bucket * zero.itemsize)

    def on(self, event: Event, ledger: Ledger, *, first: bool, last: bool) -> None:
        if event.kind in ("enter", "enter backward"):
            if not self._queue and not self._available:
                self._begin()
            self._fetch(event.name, ledger)
        elif event.kind == "leave" and event.name in self.zero.model.modules:
            self._release(event.name, ledger)
        elif event.kind == "gradient":
            self._gradient(event, ledger)
        elif event.kind == "leave backward" and event.name == "":
            self._reduce(ledger)
            for name in [*self._available]:
                self._free(name, ledger)

    def before_optimizer(self, ledger: Ledger) -> None:
        self.zero._norm(self.zero.trained, self.zero.placement.shards, ledger)
        ledger.add("gradients", FP32 * self.zero.partition)  # flattened for the step

    def stepped_shapes(self) -> list[tuple[int, ...]]:
        return self.zero.stepped_shapes()

    def after_optimizer(self, ledger: Ledger) -> None:
        ledger.add("gradients", -FP32 * self.zero.partition)

    # ---- gathering -------------------------------------------------------------------------------------------------

    def _part(self, parameter: Parameter) -> int:
        return -(-parameter.numel // self.zero.placement.shards)

    def _order_of_use(self) -> list[tuple[str, ...]]:
        owned = self.zero.model.modules
        kinds = ("enter", "enter backward")
        return [owned.get(event.name, ()) for event in self.zero.model.trace if event.kind in kinds]

    def _begin(self) -> None:
        """DeepSpeed knows the order of use from the step before."""
        self._step = 0
        self._queue = deque(name for names in self._uses for name in names)

    def _fetch(self, module: str, ledger: Ledger) -> None:
        own = self.zero.model.modules.get(module, ())
        names = [name for name in own if name not in self._small]
        self._gather([name for name in names if name not in self._available and name not in self._inflight], ledger)
        for name in names:
            if name in self._inflight:
                self._wait(name, ledger)
        for name in own:
            if self._queue and self._queue[0] == name:
                self._queue.popleft()
        live = sum(self.zero.by_name[name].numel for name in {*self._available, *self._inflight})
        room, ahead, numel = min(MOST_LIVE - live, PREFETCH), list[str](), 0
        while self._queue and numel < room:
            name = self._queue.popleft()
            there = name in self._available or name in self._inflight or name in self._small
            if not there and name not in ahead:
                ahead.append(name)
                numel += self.zero.by_name[name].numel
        self._gather(ahead, ledger)
        self._step += 1

    def _gather(self, names: list[str], ledger: Ledger) -> None:
        if not names:
            return
        together = list(names)
        padded = sum(self._part(self.zero.by_name[name]) for name in names) * self.zero.placement.shards
        ledger.add("gathered parameters", padded * self.zero.itemsize)
        self._flat[id(together)] = (padded * self.zero.itemsize, set(names))
        for name in names:
            self._inflight[name] = together

    def _wait(self, name: str, ledger: Ledger) -> None:
        """The first wait copies all that came together out of the buffer; the last one frees it."""
        together = self._inflight.pop(name)
        size, left = self._flat[id(together)]
        for other in together:
            if other not in self._available:
                ledger.add("gathered parameters", self.zero.by_name[other].numel * self.zero.itemsize)
                self._available.add(other)
        left.discard(name)
        if not left:
            ledger.add("gathered parameters", -size)
            del self._flat[id(together)]

    def _release(self, module: str, ledger: Ledger) -> None:
        candidates = {name for name in self.zero.model.modules[module] if name in self._available}
        passed = 0
        for names in self._uses[self._step :]:
            if passed >= REUSE or not candidates:
                break
            for name in names:
                candidates.discard(name)
                passed += self.zero.by_name[name].numel
        for name in candidates:
            self._free(name, ledger)

    def _free(self, name: str, ledger: Ledger) -> None:
        if name in self._inflight:
            self._wait(name, ledger)
        self._available.discard(name)
        ledger.add("gathered parameters", -self.zero.by_name[name].numel * self.zero.itemsize)

    # ---- gradients -------------------------------------------------------------------------------------------------

    def _gradient(self, event: Event, ledger: Ledger) -> None:
        zero, numel = self.zero, self.zero.by_name[event.name].numel
        ledger.add("unreduced gradients", event.bytes)
        if zero.filled + numel > zero.bucket and zero.filled:
            self._reduce(ledger)
        zero.filled += numel
        if numel > zero.bucket:
            self._reduce(ledger)
        ledger.add("unreduced gradients", -event.bytes)
        if event.name in self._available:
            self._free(event.name, ledger)

    def _reduce(self, ledger: Ledger) -> None:
        ledger.spike("unreduced gradients", self.zero.filled * self.zero.itemsize)
        self.zero.filled = 0
