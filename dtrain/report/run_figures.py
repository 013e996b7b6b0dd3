"""What a page tells of a run: one frozen value, read from the files of its folder.

    config.yaml  data.json  summary.json  metrics.jsonl  traffic/rank-K.json  choice.json

Only config.yaml and metrics.jsonl must be there: a run that is still going on, or has failed, has a page too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import ConfigError
from dtrain.launchers.strict_json import Damaged, json_in, json_of, shaped
from dtrain.report import summary as summaries
from dtrain.report.comparing import settings_of
from dtrain.report.summary import Summary
from dtrain.train.metrics.rows import Row, read

__all__ = ["CHOICE", "TRAFFIC", "Point", "RunFigures", "Traffic", "read_run", "read_runs"]

CHOICE, TRAFFIC = "choice.json", "traffic"
SPLIT = ("computing_seconds", "encode_seconds", "exchange_seconds", "decode_seconds")
"""What older runs do not have."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One training row: figures since the start of the run, NaN where there is none; ``loss``: of that step."""

    step: float
    loss: float
    tokens: float
    seconds: float
    sent_bytes: float
    exposed_seconds: float
    computing_seconds: float
    encode_seconds: float
    exchange_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sent across the replicate axis. ``sent``: bytes and messages by what they were sent as, and by op;
    ``waited``: exposed seconds by what was waited for.
    """

    rank: int
    host: str
    sent: Mapping[str, Mapping[str, tuple[int, ...]]]
    waited: Mapping[str, float]

    @property
    def bytes_as(self) -> dict[str, int]:
        """Bytes by what they were sent as."""
        return {label: sum(sum(count[:1]) for count in by_op.values()) for label, by_op in self.sent.items()}


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """``validation``: (step, loss). ``decisions``: (step, text). ``data``: what identifies the data, empty if nothing
    does. ``choice``: choice.json, as it is.
    """

    name: str
    folder: Path
    settings: Mapping[str, object]
    summary: Summary | None
    points: Sequence[Point]
    validation: Sequence[tuple[float, float]]
    decisions: Sequence[tuple[int, str]]
    traffic: Sequence[Traffic]
    data: str
    choice: Mapping[str, object]

    @property
    def last(self) -> Point:
        """The last row. There is at least one."""
        return self.points[-1]

    @property
    def validation_loss(self) -> float | None:
        """The last one, None if nothing was evaluated."""
        return self.validation[-1][1] if self.validation else None

    def at(self, step: float) -> Point | None:
        """The last row up to this step; None before the first."""
        return next((point for point in reversed(self.points) if point.step <= step), None)


def read_run(folder: Path, name: str = "") -> RunFigures:
    """The figures of the run in ``folder``, called ``name`` (the last two parts of its folder by default).

    Raises ``ConfigError`` for a folder that is no run, for one without metrics, and for damaged ones.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give the folder of a run: the run.dir of its command")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run: it has no config.yaml; give the run.dir of a `dtrain train`")
    try:
        rows = read(folder / "metrics.jsonl")
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    points = tuple(_point(row) for row in rows if "loss" in row and "tokens" in row)
    if not points:
        raise ConfigError(
            f"{folder} has no metrics yet: metrics.jsonl has a row every train.log_every_steps steps; wait for the "
            f"first, or see `dtrain jobs why {folder}`"
        )
    return RunFigures(
        name=name or "/".join(folder.absolute().parts[-2:]),
        folder=folder,
        settings=settings_of(folder),
        summary=_summary(folder),
        points=points,
        validation=tuple((_number(row, "step"), _number(row, "validation_loss")) for row in rows if _validates(row)),
        decisions=tuple((int(_number(row, "step")), str(row["decision"])) for row in rows if "decision" in row),
        traffic=tuple(_traffic(folder / TRAFFIC)),
        data=_data(folder),
        choice=_object(folder / CHOICE),
    )


def read_runs(named: Sequence[tuple[str, Path]]) -> tuple[list[RunFigures], list[str]]:
    """The figures of those runs, by name and folder, that have any; and why the others are left out.

    Raises ``ConfigError`` where none has.
    """
    runs, left_out = [], []
    for name, folder in named:
        try:
            runs.append(read_run(folder, name))
        except ConfigError as error:
            left_out.append(f"left out: {error}")
    if not runs:
        raise ConfigError("\n".join(left_out))
    return runs, left_out


def _summary(folder: Path) -> Summary | None:
    try:
        return summaries.read(folder / "summary.json")
    except (OSError, ValueError):
        return None


def _validates(row: Row) -> bool:
    return math.isfinite(_number(row, "validation_loss")) and math.isfinite(_number(row, "step"))


def _point(row: Row) -> Point:
    names = ("step", "loss", "tokens", "seconds", "sent_bytes", "exposed_seconds", *SPLIT)
    return Point(**{name: _number(row, name) for name in names})


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _traffic(folder: Path) -> Iterator[Traffic]:
    """By rank; files that are damaged are left out."""
    records = []
    for path in folder.glob("rank-*.json"):
        try:
            records.append(shaped(Traffic, json_of(path.read_text(errors="replace"))))
        except (Damaged, OSError, ValueError):
            continue
    yield from sorted(records, key=lambda record: record.rank)


def _data(folder: Path) -> str:
    record = _object(folder / "data.json")
    return str(record.get("sha256") or record.get("digest") or "")


def _object(path: Path) -> Mapping[str, object]:
    content = json_in(path)
    return content if isinstance(content, dict) else {}
