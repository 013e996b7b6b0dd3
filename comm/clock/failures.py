"""Replicas that are lost, and what a run does then.

    restart     the replicas are fixed: all go back to the last checkpoint and make the steps since then again
    members     replicas come and go: the others notice it where they wait for each other, exchange again without the
                lost one, and go on; it comes back, copies the outer parameters and their momentum, and takes part

`members` meets in the loop of the local update itself, as `dtrain.comm.runtime.membership.elastic_rounds` does.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from dtrain.comm.clock.channel import ClockHandle
from dtrain.comm.clock.times import latest, of_all
from dtrain.comm.runtime.local_updates import require_elastic
from dtrain.comm.runtime.loop import LocalUpdateLoop
from dtrain.comm.runtime.meeting import Peers
from dtrain.comm.runtime.membership.elastic_rounds import awaited, send_again

if TYPE_CHECKING:
    from dtrain.comm.clock.clock import Clock

Policy: TypeAlias = Literal["restart", "members"]
HOUR = 3600.0


@dataclass(frozen=True)
class Failures:
    """``per_hour``: of the whole run, at random moments from ``seed``. Seconds: until the others notice a loss, and
    until a lost replica, or a restarted run, is there again.

    Raises ``ValueError`` for what cannot be.
    """

    per_hour: float
    policy: Policy = "restart"
    detect_seconds: float = 10.0
    restart_seconds: float = 300.0
    checkpoint_every_steps: int = 100
    checkpoint_seconds: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.per_hour < math.inf:
            raise ValueError(f"{self.per_hour!r} failures per hour; give a number above 0, or leave failures out")
        for name in ("detect_seconds", "restart_seconds", "checkpoint_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}; give 0 or more seconds")
        if self.policy not in ("restart", "members"):
            raise ValueError(f"policy={self.policy!r}; choose restart or members")
        if self.checkpoint_every_steps < 1:
            raise ValueError(f"checkpoint_every_steps={self.checkpoint_every_steps}; give a positive whole number")

    def moments(self) -> Iterator[float]:
        """When a replica is lost, in seconds from the beginning."""
        draw, now = random.Random(self.seed), 0.0
        while True:
            now += draw.expovariate(self.per_hour / HOUR)
            yield now


@dataclass
class Losses:
    """What they cost. ``lost_seconds``: of all replicas, made again or waited for. ``absent``: replica-seconds."""

    failures: int = 0
    lost_seconds: float = 0.0
    absent: float = 0.0


class Restarts:
    """All replicas go back to the last checkpoint."""

    def __init__(self, failures: Failures, clock: Clock) -> None:
        self.losses, self._failures, self._clock = Losses(), failures, clock
        self._moments = failures.moments()
        self._next = next(self._moments)
        self._kept_at, self._steps = 0.0, 0

    def step_ended(self) -> None:
        """Make up for failures within the step that has ended."""
        machine, failures = self._clock.machine, self._failures
        while of_all(machine.now) >= self._next:
            again = max(0.0, self._next - self._kept_at)
            lost = again + failures.detect_seconds + failures.restart_seconds
            self.losses.failures += 1
            self.losses.lost_seconds += lost
            machine.now = of_all(machine.now) + lost
            # The steps that are made again keep what was saved; the next failure strikes within them, or later.
            self._kept_at += failures.detect_seconds + failures.restart_seconds + again
            self._next = max(next(self._moments), self._kept_at)
        self._steps += 1
        if self._steps % failures.checkpoint_every_steps == 0:
            machine.now = machine.now + failures.checkpoint_seconds
            self._kept_at = of_all(machine.now)


class Members(Peers):
    """The `Meeting` of a local update whose replicas come and go.

    Raises ``ValueError`` for a sync whose replicas cannot.
    """

    def __init__(self, failures: Failures, clock: Clock) -> None:
        self.losses, self._failures, self._clock = Losses(), failures, clock
        method = clock.attached.method
        if not hasattr(method, "meeting"):
            raise ValueError(
                "replicas can come and go between the rounds of a local update, such as diloco(...); with any other "
                "sync a lost one restarts all: policy=restart"
            )
        self._loop = cast(LocalUpdateLoop, method)
        require_elastic(self._loop.spec)
        self._loop.meeting = self
        self._moments = failures.moments()
        self._next = next(self._moments)
        self._back: list[float] = []
        """When the replicas that are away come back."""
        self._world = clock.network.size

    def step_ended(self) -> None:
        """Nothing: replicas meet at the ends of rounds."""

    def wait(self, loop: LocalUpdateLoop, *, closing: bool = False) -> None:
        machine = self._clock.machine
        while fragments := awaited(loop, closing):
            loop.channel.flush()
            handles = [handle for fragment in fragments for handle in fragment.reductions[0].handles]
            arrives = latest(machine.now, *(cast("ClockHandle[object]", handle).ended_at for handle in handles))
            if not self._regrouped(of_all(arrives)):
                return
            send_again(loop)

    def _regrouped(self, until: float) -> bool:
        """Leave out who was lost until then, and take in who is back; whether there was anybody."""
        machine, failures, changed = self._clock.machine, self._failures, False
        while self._next <= until:
            moment, self._next = self._next, next(self._moments)
            self.losses.failures += 1
            if len(self._back) < self._world - 1:  # the last one has nobody to leave it out
                heapq.heappush(self._back, moment + failures.restart_seconds)
                self.losses.absent += failures.restart_seconds
            self._pause(moment + failures.detect_seconds)
            changed = True
        returned = 0
        while self._back and self._back[0] <= of_all(machine.now):
            heapq.heappop(self._back)
            returned, changed = returned + 1, True
        if returned:
            self._pause(of_all(machine.now) + self._hand_over())
        if changed:
            self._clock.channel.among(self._world - len(self._back))
        return changed

    def _pause(self, until: float) -> None:
        machine = self._clock.machine
        before = of_all(machine.now)
        machine.wait(until)
        self.losses.lost_seconds += of_all(machine.now) - before

    def _hand_over(self) -> float:
        """Seconds in which a member copies to those that are behind what all replicas share."""
        state = self._loop.context.state
        shared = [name for name, kind in state.kinds.items() if kind == "replicated"]
        elements = sum(named[name].numel() for named in state.tensors.values() for name in shared if name in named)
        link = self._clock.network.levels[0].link
        return 4 * elements / link.rate + link.latency


Interruptions: TypeAlias = Restarts | Members


def interruptions(failures: Failures, clock: Clock) -> Interruptions:
    """What ``failures`` do to the run of ``clock``."""
    return Members(failures, clock) if failures.policy == "members" else Restarts(failures, clock)


@dataclass
class Never:
    """A run in which nobody is lost."""

    losses: Losses = field(default_factory=Losses)

    def step_ended(self) -> None:
        """Nothing."""
