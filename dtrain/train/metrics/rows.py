"""metrics.jsonl: one JSON object per line, appended to; only a resume truncates it, to its checkpoint's step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dtrain.launchers import strict_json

__all__ = ["Row", "Value", "as_line", "cut", "parse", "read"]

Value = float | int | str | bool | None
Row = dict[str, Value]


def as_line(row: Mapping[str, Value]) -> str:
    """One line of JSON with its newline; NaN and infinities become null, as JSON lacks them.

    >>> as_line({"step": 3, "loss": float("nan")})
    '{"step": 3, "loss": null}\\n'
    """
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"


def parse(line: str) -> Row | None:
    """The row of a line; None if the line is torn or damaged, that is, not one whole JSON object of plain values."""
    try:
        row = strict_json.parse(line)
    except ValueError:
        return None
    plain = all(value is None or isinstance(value, float | int | str | bool) for value in row.values())
    return cast(Row, row) if plain else None


def read(path: Path) -> list[Row]:
    """All rows of the file; none if there is no file. A torn last line is left out: its writer was killed.

    Raises ValueError, naming the line, where the file is damaged anywhere else.
    """
    return [row for _, row in _whole_lines(path)]


def cut(path: Path, last_step: int) -> None:
    """Drop the rows with a step beyond ``last_step`` and a torn last line: all of them or, if killed, none."""
    if not path.exists():
        return
    lines = [line for line, row in _whole_lines(path) if _step(row) <= last_step]
    spare = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with spare.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    spare.replace(path)


def _step(row: Row) -> float:
    step = row.get("step")
    return step if isinstance(step, int | float) else -math.inf


def _whole_lines(path: Path) -> list[tuple[str, Row]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    pairs: list[tuple[str, Row]] = []
    for number, line in enumerate(lines, 1):
        row = parse(line) if line.endswith("\n") else None
        if row is not None:
            pairs.append((line, row))
        elif number < len(lines):
            raise ValueError(
                f"{path}, line {number} is not a JSON object: {line.strip()[:80]!r}; repair or remove that line"
            )
    return pairs
