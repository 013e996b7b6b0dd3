"""A sync on a described model, engine and network: what it sends, and when everything happens.

The runtime itself walks (`dtrain.comm.runtime`), on shadows, through a `ClockChannel`: what is simulated is what runs.
All ranks that do the same are one rank. They may differ in speed: see `Machine.slowdown`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.clock.channel import ClockChannel, Machine
from dtrain.comm.clock.failures import Failures, Interruptions, Never, interruptions
from dtrain.comm.clock.layouts import layout
from dtrain.comm.clock.network import Level, Link, Network
from dtrain.comm.clock.pieces import ClockPieces
from dtrain.comm.clock.shadow import shadows
from dtrain.comm.clock.speeds import Speeds
from dtrain.comm.clock.step import Step
from dtrain.comm.clock.times import Times, mean_of, of_all
from dtrain.comm.clock.wire import Wire
from dtrain.comm.inner_optimizers.muon import Muon, Settings
from dtrain.comm.ops import Axis, Place
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.meter import Meter

IDEAL = Network((Level("ranks", 1, Link()),), "ring")


@dataclass(frozen=True)
class Walked:
    """A number of steps. Seconds; ``utilization``: the share of them in which ranks computed.

    ``goodput``: the share of them, over all replicas, in which they computed what was kept.
    """

    steps: int
    seconds: float
    compute_seconds: float
    exposed_seconds: float
    sent_bytes: int
    failures: int = 0
    goodput: float = 1.0

    @property
    def utilization(self) -> float:
        return self.compute_seconds / self.seconds if self.seconds else 1.0

    @property
    def step_seconds(self) -> float:
        return self.seconds / max(1, self.steps)


@dataclass(frozen=True)
class Engine:
    """An engine by its name, ranks of each replica, and which rank is walked: (replica, shard)."""

    name: str = "module"
    shards: int = 1
    rank: tuple[int, int] = (0, 0)
    bucket_mib: float = 4.0


class Clock:
    """A run of ``sync``, walked on one of its ranks.

    Args:
        step: the model and its step on this rank.
        network: between the replicas.
        engine: what holds the shard axis; "module": each rank a replica. See `dtrain.comm.clock.layouts`.
        shards: ranks of each replica, on ideal links.
        rank: the replica and the shard that is walked.
        machine: of each rank.
        speeds: how ranks differ.
        failures: how replicas are lost; never by default.

    >>> from dtrain import diloco
    >>> clock = Clock(diloco(every_steps=10), Step.even({"w": (1000, 1000)}, 0.1), Network.of("link=100mbit nodes=2"))
    >>> round(clock.train(20).utilization, 3)
    0.758
    """

    def __init__(
        self, sync: Sync, step: Step, network: Network, *, engine: Engine | None = None, machine: Machine | None = None,
        speeds: Speeds | None = None, failures: Failures | None = None,
    ) -> None:  # fmt: skip
        engine = Engine() if engine is None else engine
        self.machine, self.network, self.described = Machine() if machine is None else machine, network, step
        replica, shard = engine.rank
        places: dict[Axis, Place] = {
            "replicate": Place(replica, network.size), "shard": Place(shard, engine.shards)
        }  # fmt: skip
        self.wires: dict[Axis, Wire] = {"replicate": Wire(network), "shard": Wire(IDEAL)}
        self.channel = ClockChannel(self.machine, self.wires, places)
        held = layout(engine.name, step, places["shard"], engine.bucket_mib)
        self.pieces = ClockPieces(step, held, self.channel, inner_for(sync))
        with _quietly(), shadows():
            self.attached = sync.bind(self.pieces, 0)
            self.attached.may_compile = False
        self.speeds = Speeds() if speeds is None else speeds
        self.interrupted: Interruptions | Never = Never() if failures is None else interruptions(failures, self)
        self._steps = 0
        self._begun()

    @property
    def meter(self) -> Meter:
        """What the rank has sent since the beginning, set-up included."""
        return self.channel.meter

    def train(self, steps: int, each: Callable[[int], None] | None = None) -> Walked:
        """Walk ``steps`` steps; ``each`` is called after each. Returns what they took."""
        machine, before = self.machine, (self._now(), self._computed(), mean_of(self.machine.exposed))
        sent, losses = self.meter.sent_bytes, replace(self.interrupted.losses)
        for number in range(steps):
            with _quietly(), shadows():
                self._step()
            if each is not None:
                each(number)
        seconds, computed = self._now() - before[0], self._computed() - before[1]
        exposed = mean_of(machine.exposed) - before[2]
        failures = self.interrupted.losses.failures - losses.failures
        absent = (self.interrupted.losses.absent - losses.absent) / (self.network.size * seconds) if seconds else 0.0
        goodput = computed / seconds * max(0.0, 1 - absent) if seconds else 1.0
        return Walked(steps, seconds, computed, exposed, self.meter.sent_bytes - sent, failures, goodput)

    def close_round(self) -> None:
        """Exchange what is open, as at the end of a run."""
        with _quietly(), shadows():
            self.attached.close_round()

    def _step(self) -> None:
        samples, world = self.attached.method.samples, self.network.size
        self.machine.slowdown = self.speeds.of_step(self._steps, world)
        self._steps += 1
        if samples:
            for _ in range(samples):
                self.attached.estimate(self._loss)
        else:
            self.pieces.forward_backward()
        self.attached.step()
        self.machine.settle()
        self.interrupted.step_ended()
        self.wires["replicate"].clear(self.channel.oldest())

    def _loss(self) -> Tensor:
        self.pieces.forward()
        return torch.ones(())

    def _begun(self) -> None:
        """Time is counted from the first step on, traffic from the set-up on."""
        zero: Times = 0.0
        self.machine.settle()
        self.machine.now, self.machine.exposed, self.machine.worked, self.machine.taken = zero, zero, zero, zero
        self.channel.restart()
        for wire in self.wires.values():
            wire.busy.clear()
            wire.events.clear()

    def _now(self) -> float:
        return of_all(self.machine.now)

    def _computed(self) -> float:
        return mean_of(self.machine.worked)


def inner_for(sync: Sync) -> torch.optim.Optimizer:
    """An inner optimizer that ``sync`` accepts: SGD, else AdamW, else Muon.

    Raises ``ValueError`` where it accepts none of them, with what it says about the last.
    """
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    candidates = (
        torch.optim.SGD([weight], lr=0.1),
        torch.optim.AdamW([weight], lr=0.1),
        Muon([weight], Settings(lr=0.1)),
    )
    for optimizer in candidates:
        try:
            sync.require_inner(optimizer)
        except ValueError as error:
            refusal = error
        else:
            return optimizer
    raise refusal


@contextmanager
def _quietly() -> Iterator[None]:
    """Warnings are for runs: here gradients are ones, and losses do not change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
