"""One row of a sweep: a unique (op, transport, dtype, ranks, bytes), with everything that was measured of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Row", "append", "read"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times in milliseconds: of each iteration the largest over the ranks. Rates in Mbit/s of 10^6.

    ``sent_bytes``: per iteration, what the interface of the busiest host counted per rank, headers included.
    ``optimal_bytes``: what an optimal algorithm sends per rank. ``wrong``: values that were not what they must be.
    ``invalid``: why the row says nothing about the link, empty if it does.
    """

    op: str
    transport: str
    dtype: str
    world: int
    bytes: int
    iterations: int
    min_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    algbw_mbit: float
    busbw_mbit: float
    sent_bytes: int
    optimal_bytes: int
    link_mbit: float
    slowest_rank: int
    slowest_host: str
    wrong: int
    cpu_busy: float
    invalid: str = ""

    @property
    def of_link(self) -> float:
        """The share of the link's rate that the bus bandwidth is; 0 where the rate is not known."""
        return self.busbw_mbit / self.link_mbit if self.link_mbit else 0.0


def append(path: Path, row: Row) -> None:
    """Add a row to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """The rows so far; a torn last line is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def slower(rows: Iterable[Row], baseline: Sequence[Row], *, than: float = 1.25) -> list[tuple[Row, float]]:
    """Rows whose median takes more than ``than`` times that of the same row of an older sweep, and how many times."""
    old = {(row.op, row.transport, row.dtype, row.world, row.bytes): row.p50_ms for row in baseline}
    found = []
    for row in rows:
        before = old.get((row.op, row.transport, row.dtype, row.world, row.bytes))
        if before and row.p50_ms / before > than:
            found.append((row, row.p50_ms / before))
    return found
