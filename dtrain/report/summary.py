"""summary.json and the closing text of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dtrain.launchers import strict_json
from dtrain.report.figures import in_bytes, in_time

__all__ = ["Summary", "read", "render"]

GAP = " " * 6


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures that a run ends with. None: not measured, or not finite.

    run                    its name, for example the last two parts of its folder
    loss                   token-weighted mean over all ranks, at the last step
    validation_loss        of what ``evaluated`` names: "parameters" or "anchor parameters"
    tokens_per_second      over all ranks
    sent_bytes_per_rank    over the slow links; ``dense_bytes_per_rank``: what dense fp32 in every step would have sent
    compute_utilization    fraction of the time spent computing, 0 to 1
    exposed_fraction       exposed communication as a fraction of the time, 0 to 1
    parameters_digest      SHA-256 of the exported parameters
    """

    run: str
    replicas: int
    shards: int
    engine: str
    steps: int
    seconds: float
    skipped_steps: int
    loss: float | None
    validation_loss: float | None
    evaluated: str
    tokens_per_second: float | None
    sent_bytes_per_rank: int
    dense_bytes_per_rank: int
    compute_utilization: float | None
    exposed_fraction: float | None
    parameters_digest: str

    def write(self, path: Path) -> None:
        """Write JSON, atomically."""
        figures = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        spare = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        with spare.open("w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        spare.replace(path)


def read(path: Path) -> Summary:
    """The summary in a file; unknown keys are ignored. Raises OSError without a file, ValueError if it is none."""
    try:
        figures = strict_json.read(path)
        names = [field.name for field in dataclasses.fields(Summary)]
        if missing := [name for name in names if name not in figures]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return Summary(**{name: _figure(figures, name) for name in names})
    except ValueError as error:
        raise ValueError(f"{path} is not the summary of a run: {error}") from error


def _figure(figures: Mapping[str, object], name: str) -> Any:
    """One figure, of its type in `Summary`. Raises ValueError for another type."""
    kind = get_type_hints(Summary)[name]
    if kind is int:
        return strict_json.integer(figures, name)
    if kind is str and not isinstance(figures[name], str):
        raise ValueError(f"{name} is {figures[name]!r:.80}, not a text")
    if kind is str:
        return figures[name]
    value = strict_json.number(figures, name)
    if value is None and kind is float:
        raise ValueError(f"{name} is null, not a number")
    return value


def render(summary: Summary) -> str:
    """The closing text: three lines without a newline at the end."""
    lines = (
        (summary.run, _mesh(summary), _steps(summary)),
        (_losses(summary), _rate(summary), _percent("compute utilization {} %", summary.compute_utilization)),
        (_sent(summary), _percent("exposed communication {} % of the time", summary.exposed_fraction)),
    )
    first, *rest = (GAP.join(figure for figure in figures if figure) for figures in lines)
    return "\n".join([f"run {first}", *rest])


def _mesh(summary: Summary) -> str:
    return f"{_count(summary.replicas, 'replica')} x {_count(summary.shards, 'shard')} ({summary.engine})"


def _steps(summary: Summary) -> str:
    skipped = f" ({summary.skipped_steps:,} skipped)" if summary.skipped_steps else ""
    return f"{_count(summary.steps, 'step')}{skipped} in {in_time(summary.seconds)}"


def _losses(summary: Summary) -> str:
    text = f"loss {_loss(summary.loss)}"
    if summary.validation_loss is not None:
        of = "" if summary.evaluated == "parameters" else f", {summary.evaluated}"
        text += f" (validation {_loss(summary.validation_loss)}{of})"
    return text


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None or not math.isfinite(loss) else f"{loss:.3f}"


def _rate(summary: Summary) -> str:
    return "" if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f} tokens/s"


def _percent(text: str, fraction: float | None) -> str:
    return "" if fraction is None else text.format(f"{100 * fraction:.1f}")


def _sent(summary: Summary) -> str:
    sent, dense = summary.sent_bytes_per_rank, summary.dense_bytes_per_rank
    text = f"sent per rank {in_bytes(sent)}"
    if not sent or not dense:
        return f"{text} (dense: {in_bytes(dense)})" if dense else text
    ratio, word = (dense / sent, "less") if dense >= sent else (sent / dense, "more")
    if ratio < 1.005:
        return f"{text}, as much as dense"
    digits = 0 if ratio >= 9.95 else 1 if ratio >= 1.095 else 2
    return f"{text}, {ratio:,.{digits}f}x {word} than dense ({in_bytes(dense)})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
