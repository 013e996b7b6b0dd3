"""What kept the processors busy while a row was measured: our ranks, or other programs. Read from /proc.

A machine is identified by its boot id, so that the hosts of a `dtrain cluster`, which are one machine, count as one.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUSY", "FOREIGN", "Load", "Watch", "of_machines", "why_invalid"]

BUSY, FOREIGN, FAR_FROM_LINK = 0.9, 0.1, 0.85
SHORTEST_SECONDS = 0.5  # the kernel counts in ticks of 10 ms, so a shorter time says nothing


@dataclass(frozen=True)
class Load:
    """The load of one rank's machine, as fractions of all its cores.

    ``busy``: everything. ``worked``: processes and other guests of the host, without interrupts, which include the
    network's own work. ``ours``: this rank alone.
    """

    machine: str
    busy: float
    worked: float
    ours: float


class Watch:
    """Measures the load from one call of `since` to another."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int, float]] = deque(maxlen=10_000)
        self._machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._cores = os.cpu_count() or 1
        self.look()

    def look(self) -> float:
        """Remember the counters; returns the moment, for `since`."""
        now = time.perf_counter()
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, idle, waiting, *_, steal = ticks
        self._seen.append((now, sum(ticks) - idle - waiting, user + nice + system + steal, time.process_time()))
        return now

    def since(self, moment: float) -> Load:
        """The load since ``moment``, or of the last half second where that is longer."""
        now = self.look()
        start = min(moment, now - SHORTEST_SECONDS)
        while len(self._seen) > 2 and self._seen[1][0] <= start:
            self._seen.popleft()
        first, last = self._seen[0], self._seen[-1]
        passed = max(last[0] - first[0], 1e-9) * self._cores
        in_ticks = passed * os.sysconf("SC_CLK_TCK")
        busy, worked = ((late - early) / in_ticks for early, late in zip(first[1:3], last[1:3], strict=True))
        return Load(self._machine, min(busy, 1.0), min(worked, 1.0), (last[3] - first[3]) / passed)


def of_machines(loads: Iterable[Load]) -> tuple[float, float]:
    """(busy, foreign): of the busiest machine, and of the one on which others than our ranks worked most.

    >>> of_machines([Load("a", 0.6, 0.6, 0.3), Load("a", 0.6, 0.6, 0.25), Load("b", 0.9, 0.9, 0.9)])
    (0.9, 0.05)
    """
    by_machine: dict[str, list[Load]] = {}
    for load in loads:
        by_machine.setdefault(load.machine, []).append(load)
    machines = by_machine.values()
    foreign = (max(load.worked for load in local) - sum(load.ours for load in local) for local in machines)
    return max(load.busy for local in machines for load in local), round(max([0.0, *foreign]), 4)


def why_invalid(busy: float, foreign: float, of_link: float) -> str:
    """Why a row says nothing about the link; empty if it does. ``of_link``: share of the rate, 0 if not known.

    >>> why_invalid(0.95, 0.0, 0.4)
    'the processors were the limit: 95 % busy at 40 % of the link'
    """
    if foreign > FOREIGN:
        return f"other programs took {foreign:.0%} of the processors".replace("%", " %")
    if busy > BUSY and 0 < of_link < FAR_FROM_LINK:
        return f"the processors were the limit: {busy:.0%} busy at {of_link:.0%} of the link".replace("%", " %")
    return ""
