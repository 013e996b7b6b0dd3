"""A table of runs: their states, the settings in which they differ, their closing figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.launchers.job_list import job_of
from dtrain.launchers.strict_json import json_in

__all__ = ["compared", "differing", "runs_below", "settings_of"]

COLUMNS = ("loss", "validation_loss", "tokens_per_second", "sent_bytes_per_rank")
MOST_KEYS = 8
APART = ("run.", "launcher.")
"""Sections that do not affect results."""


def compared(runs: Sequence[tuple[str, Path]], settings: Mapping[Path, Mapping[str, object]] | None = None) -> str:
    """A line for each run: its name, its state, the settings in which runs differ, its closing figures."""
    settings = settings or {}
    keys = differing([settings.get(folder, {}) for _, folder in runs])
    rows: list[tuple[str, ...]] = [("run", "state", *keys, *COLUMNS)]
    for name, folder in runs:
        state, stored = _state(folder), json_in(folder / "summary.json")
        # The summary of a run that has started again since is stale.
        summary = stored if isinstance(stored, dict) and state not in ("pending", "running", "failed") else {}
        values = [shown(settings.get(folder, {}).get(key)) for key in keys]
        rows.append((name, state, *values, *(_figure(summary.get(column)) for column in COLUMNS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def settings_of(folder: Path) -> dict[str, object]:
    """The configuration of a run as dotted keys; empty where it cannot be read."""
    from dtrain.errors import ConfigError
    from dtrain.train.config.compatibility import flat
    from dtrain.train.config.composition import load

    try:
        return flat(dataclasses.asdict(load(folder / "config.yaml")))
    except ConfigError:
        return {}


def runs_below(place: Path) -> list[Path]:
    """The run in a folder, or else the runs in the folders below it."""
    if (place / "config.yaml").is_file():
        return [place]
    runs = sorted(path.parent for depth in ("*", "*/*", "*/*/*") for path in place.glob(f"{depth}/config.yaml"))
    return [folder for folder in runs if not any(parent in runs for parent in folder.parents)]


def differing(settings: Sequence[Mapping[str, object]]) -> list[str]:
    """The keys whose values differ between runs, at most `MOST_KEYS`; for another ``_target_`` only that."""
    all_keys = list(dict.fromkeys(key for values in settings for key in values))
    varying = (key for key in all_keys if len({repr(values.get(key)) for values in settings}) > 1)
    keys = [key for key in varying if not key.startswith(APART)]
    targets = [key for key in keys if key.endswith("_target_")]
    inside = tuple(key.removesuffix("_target_") for key in targets)
    keys = [key for key in keys if key in targets or not key.startswith(inside or ("\0",))]
    return keys[:MOST_KEYS]


def shown(value: object) -> str:
    """A setting in a table; of a dotted name, such as a ``_target_``, its last part."""
    if value is None:
        return "-"
    return value.rpartition(".")[2] if isinstance(value, str) and value.replace(".", "").isidentifier() else str(value)


def _state(folder: Path) -> str:
    job = job_of(folder)
    return job.state() if job is not None else "not started"


def _figure(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}"
