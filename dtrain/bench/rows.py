"""One row of a sweep: a unique (op, backend, dtype, ranks, bytes), with everything that was measured of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from dtrain.launchers.strict_json import Damaged, json_of, shaped

__all__ = ["NOISE", "Key", "Measured", "Row", "append", "compare", "read", "read_as", "slower"]

Key: TypeAlias = tuple[str, str, str, int, int]

NOISE = 1.25  # medians of equal sweeps on a shared machine differ by up to this


@dataclass(frozen=True, kw_only=True)
class Row:
    """Times in milliseconds: of each iteration the largest over the ranks. Rates in Mbit/s of 10^6.

    ``backend``: gloo, nccl or mpi. ``bytes``: S, of the whole buffer. ``sent_bytes``: per iteration, what ``interface``
    of the busiest host counted per rank, headers included. ``optimal_bytes``: what an optimal algorithm sends per rank.
    ``link_mbit``: the rate of a link, 0 if it is not known. ``slowest_by``: how much more time the slowest rank took
    than the median one, as a share. ``wrong``: how many values were wrong. ``cpu_busy``, ``cpu_foreign``: shares of all
    cores, and ``invalid``: why the row says nothing about the link, empty if it does.
    """

    op: str
    backend: str
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
    interface: str
    sent_bytes: int
    optimal_bytes: int
    link_mbit: float
    slowest_rank: int
    slowest_host: str
    slowest_by: float
    wrong: int
    cpu_busy: float
    cpu_foreign: float
    invalid: str = ""

    @property
    def of_link(self) -> float:
        """The share of the link's rate that the bus bandwidth is; 0 where the rate is not known."""
        return self.busbw_mbit / self.link_mbit if self.link_mbit else 0.0

    @property
    def key(self) -> Key:
        """Identifies a row within a sweep, and the same row in another."""
        return self.op, self.backend, self.dtype, self.world, self.bytes


class Measured(Protocol):
    """A dataclass that is a row of some kind. ``wrong``: how many values were wrong."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def wrong(self) -> int: ...


R = TypeVar("R", bound=Measured)


def append(path: Path, row: Measured) -> None:
    """Add a row to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """`read_as` the rows of a sweep of collectives."""
    return read_as(path, Row)


def read_as(path: Path, kind: type[R]) -> list[R]:
    """The rows so far; none if there is no file. A last line without its end is being written, and is left out.

    Raises ``ValueError`` naming a line that is no row.
    """
    rows = []
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            rows.append(shaped(kind, json_of(line)))
        except Damaged as error:
            raise ValueError(f"{path} line {number} is no row of this version of `dtrain bench`: {error}") from error
    return rows


def compare(rows: Iterable[Row], baseline: Sequence[Row]) -> list[tuple[Row, float]]:
    """The rows that an older sweep has too, each with its median over the older one."""
    old = {row.key: row.p50_ms for row in baseline}
    return [(row, row.p50_ms / old[row.key]) for row in rows if old.get(row.key)]


def slower(rows: Iterable[Row], baseline: Sequence[Row], *, than: float = NOISE) -> list[tuple[Row, float]]:
    """Rows whose median takes more than ``than`` times that of the same row of an older sweep, and how many times."""
    return [(row, times) for row, times in compare(rows, baseline) if times > than]
