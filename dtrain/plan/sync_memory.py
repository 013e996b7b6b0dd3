"""What a sync keeps on one rank: asked of the runtime itself, which walks a few steps on the clock's shadows.

Shadows have shapes and no memory (`dtrain.comm.clock.shadow`), so a sync is bound to a model of any size and keeps what
it would keep in a run. What it keeps by name is sorted by what it declares: feedback, outer parameters, outer momentum.
Everything else that can be reached from it, between steps and just before a step is committed, is in flight: captured
values, results that have arrived, and the next values of feedback beside the present ones.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dtrain.comm.channel import Channel
from dtrain.comm.clock.channel import ClockChannel
from dtrain.comm.clock.clock import Clock, Engine
from dtrain.comm.clock.network import Level, Link, Network
from dtrain.comm.clock.pieces import ClockPieces
from dtrain.comm.clock.shadow import Shadow
from dtrain.comm.clock.step import Step
from dtrain.comm.ops import Op, Place
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.method import Sync
from dtrain.comm.shadowed import is_shadow
from dtrain.comm.state import State

STEPS = 3
"""Walked at least: feedback is there after the first step."""
MOST_STEPS = 400
"""Walked at most, where a sync names no period."""


@dataclass(frozen=True)
class SyncMemory:
    """Bytes on one rank, by term of `dtrain.plan.ledger.TERMS`.

    ``beside``: what is there in a forward and backward pass. ``between``: in the exchange between two steps, when
    gradients and activations are gone. ``exchanges``: whether gradients leave the replica.
    """

    beside: Mapping[str, int]
    between: Mapping[str, int]
    exchanges: bool


NOTHING = SyncMemory({}, {}, False)


def sync_memory(
    sync: Sync, step: Step, *, engine: str, replicas: int, shards: int, bucket_mib: float = 4.0, shard: int = 0
) -> SyncMemory:
    """What ``sync`` keeps on shard ``shard`` of replica 0, the largest over enough steps for a round to come around.

    Raises ``ValueError`` for an engine that is not known, and what `Sync.bind` raises.
    """
    network = Network((Level("ranks", replicas, Link()),), "ring")
    clock = Clock(sync, step, network, engine=Engine(engine, shards, (0, shard), bucket_mib))
    watch = _Watch(clock)
    clock.train(_steps(sync), lambda _: watch.beside.look())
    return SyncMemory(dict(watch.beside.terms), dict(watch.between.terms), clock.pieces._exchange is not None)


def _steps(sync: Sync) -> int:
    """Until each fragment had a round, and the result of one was applied."""
    every, overlap = getattr(sync, "every_steps", None), getattr(sync, "overlap_steps", 0)
    warmup = getattr(sync, "warmup_steps", 0)
    if not isinstance(every, int):
        return STEPS + (warmup if isinstance(warmup, int) else 0)
    more = sum(number for number in (overlap, warmup) if isinstance(number, int))
    return min(2 * every + more + STEPS, MOST_STEPS)


class _Watch:
    """Looks at what is held when a step is about to be committed, and at each op that is sent."""

    def __init__(self, clock: Clock) -> None:
        self.flows: list[Generator[object, object, object]] = []
        self.beside, self.between = _Largest(clock, self.flows), _Largest(clock, self.flows)
        method, meter = clock.attached.method, clock.meter
        prepare, record = method.prepare, meter.record

        def prepared() -> bool:
            ready = prepare()
            self.beside.look()
            return ready

        def recorded(op: Op, place: Place, label: str) -> None:
            record(op, place, label)
            if op.axis == "replicate":
                (self.beside if label == "gradients" else self.between).look(op)

        method.prepare = prepared  # type: ignore[method-assign]
        meter.record = recorded  # type: ignore[method-assign]
        self._follow(clock.channel)

    def _follow(self, channel: ClockChannel) -> None:
        """Note the flows of ``channel``, and of its clones, while they are under way."""
        start, clone = channel.start, channel.clone

        def started(flow: Any, label: str, then: Any = None) -> Any:
            self.flows[:] = [other for other in self.flows if other.gi_frame is not None]  # type: ignore[attr-defined]
            self.flows.append(flow)
            return start(flow, label, then)

        def cloned() -> Channel:
            made = clone()
            self._follow(cast(ClockChannel, made))
            return made

        channel.start, channel.clone = started, cloned  # type: ignore[method-assign]
        for made in channel._clones:
            self._follow(made)


class _Largest:
    """The largest sum that was seen, and its terms."""

    def __init__(self, clock: Clock, flows: Sequence[object]) -> None:
        self.clock, self.flows, self.terms = clock, flows, dict[str, int]()

    def look(self, *more: object) -> None:
        """Count what is there now."""
        context, pieces = self.clock.attached.context, self.clock.pieces
        reached = _Reached([self.clock.attached.method, context.state, *self.flows, *more], pieces)
        terms: dict[str, int] = {}
        named: set[int] = set()
        for state in reached.states:
            for tensors in state.tensors.values():
                for name, tensor in tensors.items():
                    place = _place(tensor)
                    if place not in named:
                        named.add(place)
                        term = _term(name, context)
                        terms[term] = terms.get(term, 0) + tensor.numel() * tensor.dtype.itemsize
        flight = sum(size for place, size in reached.shadows.items() if place not in named)
        terms["in flight"] = terms.get("in flight", 0) + flight
        if sum(terms.values()) > sum(self.terms.values()):
            self.terms = terms


def _term(name: str, context: Context) -> str:
    if name == "anchor":
        return "outer parameters"
    if name in context.fed_back:
        return "feedback"
    if name == "arrived":
        return "in flight"
    return "outer momentum" if "anchor" in context.state.kinds else "other sync state"


def _place(tensor: torch.Tensor) -> int:
    """Of its memory: views share it."""
    return id(cast(Shadow, tensor).moment) if is_shadow(tensor) else id(tensor)


_OUTSIDE = (Clock, ClockPieces, ClockChannel, Channel, types.ModuleType, type, types.FunctionType, types.CodeType)


class _Reached:
    """All states, and the bytes of all memory of shadows, that can be reached from ``roots``.

    The model's parameters are left out, and gradients unless a state has staged them.
    """

    def __init__(self, roots: Iterable[object], pieces: ClockPieces) -> None:
        self.states, self.shadows = list[State](), dict[int, int]()
        seen, todo = dict[int, object](), list(roots)  # kept alive, so that no other object gets its id
        while todo:
            thing = todo.pop()
            if id(thing) in seen or isinstance(thing, _OUTSIDE):
                continue
            seen[id(thing)] = thing
            if is_shadow(thing):
                tensor = cast(Shadow, thing)
                size = tensor.numel() * tensor.dtype.itemsize
                self.shadows[_place(tensor)] = max(self.shadows.get(_place(tensor), 0), size)
                continue
            if "staging" in getattr(thing, "__dict__", ()):
                self.states.append(cast(State, thing))
            if not isinstance(thing, torch.Tensor | torch.optim.Optimizer | str | bytes | int | float):
                todo += gc.get_referents(thing)
        staged = {_place(t) for state in self.states for named in state.staging.values() for t in named.values()}
        own = {_place(value) for value in pieces.values.values()}
        own |= {_place(value) for value in pieces.gradients.values()} - staged
        for place in own:
            self.shadows.pop(place, None)
