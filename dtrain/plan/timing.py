"""Bytes and seconds of a step under each sync, walked by the clock; and the link that a utilization needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dtrain.comm.clock.channel import Machine as Processor
from dtrain.comm.clock.clock import Clock, Engine, Walked
from dtrain.comm.clock.network import Link, Network
from dtrain.comm.clock.step import Step
from dtrain.comm.runtime.method import Sync
from dtrain.plan.fits import Layout

EACH_STEP = 4
"""Steps that are walked where each is alike."""
MOST_STEPS = 600
SLOWEST, FASTEST = 1e3, 1e13
"""Bytes per second between which a link is looked for."""


@dataclass(frozen=True)
class Timed:
    """Of one rank, the mean over whole rounds. ``bytes``: sent per step to other replicas."""

    seconds: float
    bytes: float
    utilization: float


def timed(sync: Sync, step: Step, network: Network, layout: Layout, bandwidth: float = math.inf) -> Timed:
    """A step under ``sync``. ``bandwidth``: bytes per second at which a rank's arithmetic passes over memory."""
    engine = Engine(layout.runs, layout.shards, (0, 0), layout.bucket_mib)
    clock = Clock(sync, step, network, engine=engine, machine=Processor(bytes_per_second=bandwidth))
    every = getattr(sync, "every_steps", None)
    period = every if isinstance(every, int) and every > 0 else EACH_STEP
    warmup = getattr(sync, "warmup_steps", 0)
    before = (warmup if isinstance(warmup, int) else 0) + period
    clock.train(min(before, MOST_STEPS))  # a first round, and buckets as they are later
    walked: Walked = clock.train(min(period, MOST_STEPS))
    return Timed(walked.step_seconds, walked.sent_bytes / walked.steps, walked.utilization)


def needed_link(
    sync: Sync, step: Step, network: Network, layout: Layout, utilization: float, bandwidth: float = math.inf
) -> float | None:
    """Bytes per second of the outermost link at which ``sync`` reaches ``utilization``, to 5 %; None if none does.

    Latencies and inner links stay as they are.
    """

    def reached(rate: float) -> bool:
        return timed(sync, step, with_rate(network, rate), layout, bandwidth).utilization >= utilization

    if not reached(FASTEST):
        return None
    low, high = math.log(SLOWEST), math.log(FASTEST)
    while high - low > math.log(1.05):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(math.exp(middle)) else (middle, high)
    return math.exp(high)


def with_rate(network: Network, rate: float) -> Network:
    """``network`` with an outermost link of ``rate`` bytes per second in both directions."""
    first = network.levels[0]
    link = Link(rate, rate, first.link.latency_up, first.link.latency_down)
    return replace(network, levels=(replace(first, link=link), *network.levels[1:]))
