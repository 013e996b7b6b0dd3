"""Counts what crosses the links: exact payload bytes and messages by label and op, and exposed communication time.

Ops are counted, not what a transport makes of them, so that a channel and a simulation (`metered`) count the same.
Headers of TCP and of the transport are not included: a network interface counts a few percent more.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dtrain.comm.ops import Axis, Flow, Op, Place, sent_bytes

R = TypeVar("R")


@dataclass
class Count:
    """Bytes that this rank sent, and the collectives that they took."""

    bytes: int = 0
    messages: int = 0


@dataclass
class Worked:
    """Seconds of the thread that performs flows: ``encode``, in flows before their first op; ``exchange``, with an op
    on the replicate axis under way and no flow at work; ``decode``, in flows after their first op, encoding again
    included.

    An op that ends while no flow asks for its reply counts until one does, so ``exchange`` is at most too large.
    """

    encode: float = 0.0
    exchange: float = 0.0
    decode: float = 0.0


@dataclass
class Meter:
    """One rank's counts, by label: what a method calls its traffic.

    ``by``: counts by (axis, label, name of the op). ``waited``: exposed seconds by label, in which training
    stood still. ``worked``: where the time of the channel's thread went.
    """

    by: dict[tuple[Axis, str, str], Count] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    worked: Worked = field(default_factory=Worked)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sent across the replicate axis, the slow links."""
        return sum(count.bytes for (axis, _, _), count in list(self.by.items()) if axis == "replicate")

    @property
    def exposed_seconds(self) -> float:
        """Exposed communication: seconds in which training stood still for what crosses the replicate axis."""
        slow = {label for axis, label, _ in list(self.by) if axis == "replicate"}
        return sum(seconds for label, seconds in list(self.waited.items()) if label in slow)

    def sent_as(self, label: str) -> int:
        """Bytes that this rank sent across the replicate axis under ``label``."""
        return sum(c.bytes for (axis, name, _), c in list(self.by.items()) if axis == "replicate" and name == label)

    def record(self, op: Op, place: Place, label: str) -> None:
        with self._lock:
            count = self.by.setdefault((op.axis, label, type(op).__name__), Count())
            count.bytes += sent_bytes(op, rank=place.rank, world=place.size)
            count.messages += 1

    def wait(self, seconds: float, label: str) -> None:
        """Add time in which training stood still for ``label``."""
        with self._lock:
            self.waited[label] = self.waited.get(label, 0.0) + seconds

    def restart(self, *, sent_bytes: int = 0, exposed_seconds: float = 0.0) -> None:
        """Continue from the figures of an earlier process of the same run."""
        with self._lock:
            self.by = {("replicate", "before", ""): Count(bytes=sent_bytes)}
            self.waited = {"before": exposed_seconds}
            self.worked = Worked()


def metered(flow: Flow[R], meter: Meter, places: Mapping[Axis, Place], label: str) -> Flow[R]:
    """``flow``, unchanged, with each of its ops recorded in ``meter``."""
    try:
        op = next(flow)
        while True:
            meter.record(op, places[op.axis], label)
            op = flow.send((yield op))
    except StopIteration as done:
        result: R = done.value
        return result
