"""A `Channel` in simulated time: the same flows, waves and waits as `dtrain.comm.channel`, on a described network.

The moments at which a channel's thread goes on follow from the order in which flows are started, as its waves do. So
each flow is walked as far as it gets when it is started, and nothing has to be scheduled. A machine is one of

    program    what dtrain runs on: a thread, or a stream, encodes, waits and decodes one after the other, and training
               stands still where it waits for a result
    data       an ideal: whatever has its inputs begins, on as many threads as there is work; what uses a result waits
               for it. Published simulators assume it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Literal, TypeAlias, TypeVar, cast

from dtrain.comm.channel import Channel, Handle
from dtrain.comm.clock.shadow import TRAFFIC, ready
from dtrain.comm.clock.times import NEVER_LATE, Times, latest, mean_of, of_first
from dtrain.comm.clock.wire import Wire, reply
from dtrain.comm.ops import Axis, Flow, Op, Payload, Place, sent_bytes
from dtrain.comm.transports.meter import Meter

R = TypeVar("R")
Order: TypeAlias = Literal["program", "data"]


@dataclass
class Machine:
    """A rank's processor. ``now``: when its program goes on. ``bytes_per_second``: of memory that arithmetic passes.

    ``exposed``: seconds in which the program stood still for a result. ``slowdown`` multiplies the seconds of its own
    work. ``one_core``: the threads of channels run on the program's core, which they take from it unless it waits.
    """

    order: Order = "program"
    bytes_per_second: float = float("inf")
    one_core: bool = False
    slowdown: Times = 1.0
    now: Times = field(default=0.0, init=False)
    exposed: Times = field(default=0.0, init=False)
    worked: Times = field(default=0.0, init=False)
    taken: Times = field(default=0.0, init=False)
    """Seconds that threads will have taken from the program's next work."""

    def work(self, seconds: float) -> None:
        """Let the program run for ``seconds``."""
        self.settle()
        spent = seconds * self.slowdown
        self.now, self.worked = self.now + spent + self.taken, self.worked + spent
        self.taken = 0.0

    def settle(self) -> None:
        """Account for arithmetic of the program."""
        self.now = self.now + self.arithmetic()

    def arithmetic(self) -> Times:
        """Seconds of the arithmetic since the last call."""
        passed = TRAFFIC.taken()
        return 0.0 if self.order == "data" or not passed else passed / self.bytes_per_second * self.slowdown

    def in_background(self) -> Times:
        """Seconds of a thread's arithmetic since the last call."""
        spent = self.arithmetic()
        if self.one_core:
            self.taken = self.taken + spent
        return spent

    def wait(self, moment: Times) -> Times:
        """Let the program stand still until ``moment``; seconds."""
        until = latest(self.now, moment)
        waited = until - self.now
        self.taken = latest(0.0, self.taken - waited)
        self.now, self.exposed = until, self.exposed + waited
        return waited


@dataclass
class _Running(Generic[R]):
    flow: Flow[R]
    handle: ClockHandle[R]
    op: Op
    arrives: float


@dataclass
class ClockHandle(Generic[R]):
    """A flow that was started. ``ended_at``: when it has ended, once all of it was walked."""

    channel: ClockChannel
    label: str
    then: Callable[[Handle[R]], None] | None = None
    ended_at: Times = NEVER_LATE
    _result: list[R] = field(default_factory=list)

    def wait(self) -> R:
        """Let the program wait for the result."""
        channel = self.channel
        channel.flush()
        channel.machine.settle()
        if channel.machine.order == "program":
            channel.meter.wait(mean_of(channel.machine.wait(self.ended_at)), self.label)
        return self.result()

    def result(self) -> R:
        """The result of a flow that has ended."""
        return self._result[0]

    def finish(self, result: R, moment: Times) -> None:
        self._result, self.ended_at = [result], moment
        if self.then is not None:
            self.then(cast("Handle[R]", self))


class ClockChannel:
    """See the module's docstring. ``places``: of the rank that is walked. Clones share machine, wires and meter."""

    def __init__(
        self, machine: Machine, wires: Mapping[Axis, Wire], places: Mapping[Axis, Place], meter: Meter | None = None
    ) -> None:
        self.machine, self.wires, self.places = machine, wires, dict(places)
        self.meter = Meter() if meter is None else meter
        self.now: Times = NEVER_LATE
        """When the thread goes on."""
        self._running: list[_Running[object]] = []
        self._clones: list[ClockChannel] = []

    def run(self, flow: Flow[R], label: str) -> R:
        return self.start(flow, label).wait()

    def start(self, flow: Flow[R], label: str, then: Callable[[Handle[R]], None] | None = None) -> ClockHandle[R]:
        """Walk ``flow``, and those before it, by one op."""
        self.machine.settle()
        handle: ClockHandle[R] = ClockHandle(self, label, then)
        self._wave(partial(self._begin, cast("Flow[object]", flow), cast("ClockHandle[object]", handle)))
        return handle

    def seconds(self) -> float:
        self.machine.settle()
        return mean_of(self.machine.now)

    def clone(self) -> Channel:
        clone = ClockChannel(self.machine, self.wires, self.places, self.meter)
        self._clones.append(clone)
        return cast(Channel, clone)

    def flush(self) -> None:
        """Walk all flows to their ends."""
        self.machine.settle()
        while self._running:
            self._wave()

    def renew(self) -> None:
        self.flush()

    def close(self, timeout_seconds: float | None = None) -> None:
        self.flush()

    def among(self, world: int) -> None:
        """From now on there are ``world`` replicas."""
        place = self.places["replicate"]
        self.places["replicate"] = Place(min(place.rank, world - 1), world)
        for clone in self._clones:
            clone.among(world)

    def restart(self) -> None:
        """Count time from 0 again, while no flow is under way."""
        self.now = NEVER_LATE
        for clone in self._clones:
            clone.restart()

    def oldest(self) -> float:
        """A moment before which no op will be issued any more."""
        here = min([running.arrives for running in self._running], default=math.inf)
        return min([here, of_first(self.machine.now), *(clone.oldest() for clone in self._clones)])

    # ---- waves: see `dtrain.comm.channel` ----------------------------------------------------------------------------

    def _wave(self, begin: Callable[[], _Running[object] | None] | None = None) -> None:
        moves = [] if begin is None else [begin]
        moves += [partial(self._advance, running) for running in reversed(self._running)]
        self._running = [running for running in [move() for move in moves][::-1] if running is not None]

    def _begin(self, flow: Flow[object], handle: ClockHandle[object]) -> _Running[object] | None:
        self.now = latest(self.now, self.machine.now)
        return self._issue(flow, handle, None, self.machine.now)

    def _advance(self, running: _Running[object]) -> _Running[object] | None:
        self.now = latest(self.now, running.arrives)
        world = self.places[running.op.axis].size
        return self._issue(running.flow, running.handle, reply(running.op, world, running.arrives), running.arrives)

    def _issue(
        self, flow: Flow[object], handle: ClockHandle[object], answer: Payload | None, since: Times
    ) -> _Running[object] | None:
        """Resume a flow and issue its next op; None if it has ended."""
        try:
            op = next(flow) if answer is None else flow.send(answer)
        except StopIteration as done:
            self.now = self.now + self.machine.in_background()
            handle.finish(done.value, self.now if self.machine.order == "program" else since)
            return None
        self.now = self.now + self.machine.in_background()
        place = self.places[op.axis]
        self.meter.record(op, place, handle.label)
        issued = self.now
        if self.machine.order == "data":
            inputs = ready(op.payload)
            issued = since if inputs == NEVER_LATE else inputs
        sent = sent_bytes(op, rank=place.rank, world=place.size)
        arrives = self.wires[op.axis].carry(op, place.size, issued, handle.label, sent)
        return _Running(flow, handle, op, arrives)
