"""One axis of a described network at work: when each op begins and ends, one beside the other on the same links."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

import torch

from dtrain.comm.clock.network import Network
from dtrain.comm.clock.shadow import delayed
from dtrain.comm.clock.times import Times, of_all
from dtrain.comm.ops import AllGather, AllReduce, Op, Payload
from dtrain.comm.shadowed import is_shadow


@dataclass
class Event:
    """An op: when its last rank issued it, when its bytes began to flow and when the last reply was there."""

    label: str
    op: str
    bytes: int
    issued: float
    began: float
    ended: float


@dataclass
class Wire:
    """The links of one axis. Ops that were issued earlier in the program go first, others fill the gaps between them.

    ``busy``: spans in which the busiest link carries something, in order. ``events``: all ops, where ``record``.
    """

    network: Network
    record: bool = False
    events: list[Event] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)

    def carry(self, op: Op, world: int, issued: Times, label: str = "", bytes_: int = 0) -> float:
        """When the replies to ``op`` are there, which all of ``world`` ranks have issued at ``issued``."""
        last = of_all(issued)
        began, ended = self._flow(last, self.network.transfer(op, world))
        ended += self.network.latency(op, world)
        if self.record:
            self.events.append(Event(label, type(op).__name__, bytes_, last, began, ended))
        return ended

    def clear(self, before: float) -> None:
        """Forget spans that ended ``before``, when nothing more is issued."""
        del self.busy[: bisect.bisect_left(self.busy, before, key=lambda span: span[1])]

    def _flow(self, start: float, seconds: float) -> tuple[float, float]:
        """Occupy the links for ``seconds`` from ``start`` on, wherever they are free; first and last moment."""
        if not seconds:
            return start, start
        at = bisect.bisect_left(self.busy, start, key=lambda span: span[1])  # the first span that ends later
        taken, first, now, remaining = at, math.inf, start, seconds
        while remaining > 0:
            free_until = self.busy[at][0] if at < len(self.busy) else math.inf
            if free_until > now:
                first = min(first, now)
                used = min(remaining, free_until - now)
                now, remaining = now + used, remaining - used
            if remaining > 0 or free_until <= now < math.inf:
                now = max(now, self.busy[at][1]) if remaining > 0 else now
                at += 1
        joined = self.busy[taken:at]
        begin = min([first, *(span[0] for span in joined)])
        end = max([now, *(span[1] for span in joined)])
        self.busy[taken:at] = [(begin, end)]
        return first, now


def reply(op: Op, world: int, moment: float) -> Payload:
    """What a rank gets for ``op``, at ``moment``, where all of ``world`` ranks have sent the same."""
    payload = delayed(op.payload, moment)
    match op:
        case AllGather():
            return tuple(tensor.unsqueeze(0).expand(world, *tensor.shape) for tensor in payload)
        case AllReduce(reduction="sum"):
            return tuple(tensor if is_shadow(tensor) else tensor * world for tensor in payload)
        case _:
            return tuple(tensor if is_shadow(tensor) else torch.clone(tensor) for tensor in payload)
