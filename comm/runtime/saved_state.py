"""Saving and loading of one rank's state; `dtrain.comm.runtime.saved` has its format."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.method import Method
from dtrain.comm.runtime.saved import (
    EACH_SAVES,
    NOTHING_LOADED,
    Entries,
    RankedState,
    entries_for,
    holdings,
    numbers_of,
    place_name,
    require_same_sync,
    tensors_of,
)
from dtrain.comm.state import Numbers, Tensors

REFUSED = -1
"""What a rank sends in place of its state's step if it refuses the state."""

COUNTERS = ("steps", "skipped", "skipped_in_a_row")
"""Counters of the context, saved for every method."""


class Beside(NamedTuple):
    """What a state of a sync is loaded beside."""

    parameters: Mapping[str, Tensor]
    """This rank's pieces."""
    optimizer: int
    """The number of parameters of which the optimizer has state."""


class SavedState:
    """Saves and loads one rank's state."""

    def __init__(self, context: Context, method: Method) -> None:
        self._context, self._method = context, method
        self._last_saved: weakref.ref[Entries] | None = None
        self._lost_at: int | None = None
        self.kept_at: int | None = None
        """The step at which the state was last saved or loaded."""

    def state_dict(self, live: Mapping[str, Tensor] | None) -> RankedState:
        """`Attached.state_dict`. ``live``: the parameters in training, while `Attached.evaluation` shows others."""
        self.require_read()
        self._method.settle()
        self._context.saves += 1
        context = self._context
        tensors = {fqn: dict(named) for fqn, named in context.state.tensors.items()}
        values: dict[str, object] = {
            "tensors": tensors, "holds": holdings(tensors), "numbers": self.numbers(),
            "parameters": digest(context.pieces.read(copy=False)), "place": self._place(), "sync": context.description,
            "optimizer": self._optimizer_states(),
        }  # fmt: skip
        if live is not None:
            values["live"] = dict(live)
        entries, step, owner = Entries(values), self._context.steps, weakref.ref(self)
        self._last_saved, self.kept_at = weakref.ref(entries), step

        def unread() -> None:
            saved = owner()
            if saved is not None:
                saved._lost_at = step
                warnings.warn(f"the state of step {step} was thrown away unread", RuntimeWarning, stacklevel=2)

        return RankedState(self._name(), entries, unread if self._context.differs_by_rank else None)

    def load(self, state: Mapping[str, object], beside: Beside | None = None) -> None:
        """`Attached.load_state_dict`. ``beside``: what model and optimizer will hold; None: what they hold now."""
        refusal: Exception | None = None
        tensors: Tensors = {}
        numbers: Numbers = {"steps": REFUSED}
        try:
            entries, tensors, numbers = self._checked(state, beside or self._beside())
        except (TypeError, ValueError) as error:
            refusal = error
        replicas, shards = self._context.membership.gather_number(int(numbers["steps"]))
        if refusal is not None:
            raise refusal
        if REFUSED in (*replicas, *shards):
            refusing = [rank for rank, step in enumerate(replicas) if step == REFUSED]
            raise ValueError(
                f"replicas {refusing or 'of another shard'} refused the states that they were to load, and say why; "
                "load one and the same checkpoint on all ranks"
            )
        if len({*replicas, *shards}) > 1:
            raise ValueError(
                f"the states that are loaded are of different steps: {replicas} on the replicas, {shards} on the ranks "
                "of this one; load one and the same checkpoint on all ranks"
            )
        before = self._context.state.tensors, self.numbers()
        try:
            self._context.state.load(self._on_devices(tensors))
            self._load_numbers(numbers)
        except (KeyError, ValueError) as error:
            self._context.state.tensors = before[0]
            self._load_numbers(before[1])
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"this state was saved with another sync: {error.args[0]} is missing") from error
        if isinstance(live := entries.get("live"), Mapping):
            self._context.pieces.write(live)
        self.kept_at = self._context.steps

    def step_of(self, state: object) -> int:
        """The step at which ``state`` was taken. Raises as `load` does, whatever the model holds."""
        return int(self._fitting(state)[2]["steps"])

    def _checked(self, state: object, beside: Beside) -> tuple[Mapping[str, object], Tensors, Numbers]:
        """This rank's entries, and their tensors and numbers. Raises ``ValueError``, ``TypeError`` if unfit."""
        entries, tensors, numbers = self._fitting(state)
        self._require_parameters(entries, beside.parameters)
        self._require_optimizer(entries, beside.optimizer)
        return entries, tensors, numbers

    def _fitting(self, state: object) -> tuple[Mapping[str, object], Tensors, Numbers]:
        """The same, whatever model and optimizer hold."""
        saved = self._last_saved() if self._last_saved is not None else None
        if saved is not None and isinstance(state, Mapping) and any(value is saved for value in state.values()):
            raise ValueError(NOTHING_LOADED)
        entries = entries_for(state, self._name(), whichever=not self._context.differs_by_rank)
        require_same_sync(entries, self._context.description, self._place() if self._context.differs_by_rank else None)
        tensors = tensors_of(entries, self._context.state.kinds, self._context.pieces.segments, self._method.always)
        numbers = numbers_of(entries, (*COUNTERS, *self._method.counters), self.numbers())
        return entries, tensors, numbers

    def _beside(self) -> Beside:
        return Beside(self._context.pieces.read(copy=False), self._optimizer_states())

    def _require_parameters(self, entries: Mapping[str, object], parameters: Mapping[str, Tensor]) -> None:
        saved = entries.get("parameters")
        if saved is None:
            return
        now = digest(parameters)
        other_shard = str(entries.get("place")).partition(", ")[2] not in self._place()  # other parameters
        live = entries.get("live")
        if saved != now and not other_shard and not (isinstance(live, Mapping) and digest(live) == now):
            raise ValueError(
                "the model does not hold the parameters that this rank had when this state was taken; on every rank: "
                "attach, then load the model's and the optimizer's states, then the sync's, each from this rank's own "
                "files (in a round of a local update the replicas differ)"
            )

    def _require_optimizer(self, entries: Mapping[str, object], states: int) -> None:
        """Raise ``ValueError`` if the optimizer has no state, but had some when this state was taken."""
        saved = entries.get("optimizer")
        if isinstance(saved, int) and saved > 0 and not states:
            raise ValueError(
                f"the optimizer has no state, and had that of {saved} parameters when this was taken: load the "
                "optimizer's state first, then the sync's; if it is to begin anew, leave out the entry 'optimizer': "
                'load_state_dict(state | {"optimizer": None})'
            )

    def _optimizer_states(self) -> int:
        """The number of parameters of which the optimizer keeps a tensor."""
        states = self._context.pieces.optimizer.state.values()
        return sum(any(isinstance(value, Tensor) for value in state.values()) for state in states)

    def _on_devices(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """``tensors``, each on the device of its parameter."""
        devices = {fqn: value.device for fqn, value in self._context.pieces.read(copy=False).items()}
        moved: dict[str, dict[str, Tensor]] = {}
        for fqn, named in tensors.items():
            moved[fqn] = {name: tensor.to(devices.get(fqn, tensor.device)) for name, tensor in named.items()}
        return moved

    def require_read(self) -> None:
        """Raise ``RuntimeError`` if a state of this rank was discarded unread."""
        if self._lost_at is not None:
            step, self._lost_at = self._lost_at, None
            raise RuntimeError(
                f"the state that {self._place()} gave at step {step} was thrown away unread, so what it keeps is not "
                "in that checkpoint: a framework asked all ranks and wrote what the main process got (as "
                f"register_for_checkpointing of accelerate, or save of lightning.fabric). {EACH_SAVES}"
            )

    def numbers(self) -> Numbers:
        """The counters that a checkpoint keeps."""
        context = self._context
        counted: Numbers = {name: int(getattr(context, name)) for name in COUNTERS}
        return {**counted, **self._method.numbers(), **context.plan.numbers()}

    def _load_numbers(self, numbers: Mapping[str, float]) -> None:
        context = self._context
        for name in COUNTERS:
            setattr(context, name, int(numbers[name]))
        context.plan.load_numbers(numbers)
        self._method.load_numbers(numbers)

    def _name(self) -> str:
        """The key of this rank's entries in a state."""
        places = self._context.pieces.channel.places
        return place_name(places["replicate"], places["shard"])

    def _place(self) -> str:
        replicas, shards = (self._context.pieces.channel.places[axis] for axis in ("replicate", "shard"))
        return f"replica {replicas.rank} of {replicas.size}, shard {shards.rank} of {shards.size}"


def digest(values: Mapping[str, Tensor]) -> str:
    """A digest of every element, whatever the order of the names."""
    hashed = hashlib.blake2b(digest_size=16)
    for fqn in sorted(values):
        hashed.update(fqn.encode())
        hashed.update(values[fqn].contiguous().cpu().numpy().tobytes())
    return hashed.hexdigest()
