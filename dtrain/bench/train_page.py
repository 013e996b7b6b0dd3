"""The page of `dtrain bench train`: where a step goes with each sync, what it sends, and what the losses come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from dtrain.bench.train_rows import TrainRow, interval, tied
from dtrain.report.at_the_end import REPORT, drawn
from dtrain.report.page import Notes, Page, Part, Table
from dtrain.report.plots import Bars, Curve, Lines

__all__ = ["page", "report"]

COLUMNS = (
    "sync", "ms/step", "alone", "times", "between", "noise", "of time", "exposed", "bytes/step", "less", "loss",
    "invalid",
)  # fmt: skip


def report(folder: Path, rows: Sequence[TrainRow], lines: Sequence[str]) -> str:
    """Draw report.html; returns the line that tells of it. ``lines``: those below the table."""
    again = f"dtrain bench train run.dir={folder} measures again"
    return drawn(folder / REPORT, lambda: page("/".join(folder.parts[-2:]), rows, lines), again=again)


def page(name: str, rows: Sequence[TrainRow], lines: Sequence[str]) -> Page:
    """Bars of time and bytes, the fastest first; losses by step and by time where they were trained; all rows."""
    fastest = [row.sync for row in tied(rows)]
    table = Table(
        COLUMNS, [_cells(row) for row in rows], title="Rows", note="bold: the fastest, and what cannot be told from it",
        best=[number for number, row in enumerate(rows) if row.sync in fastest],
    )  # fmt: skip
    parts: list[Part] = [Notes(lines)]
    if rows:
        ordered = sorted(rows, key=lambda row: statistics.median(row.times))
        names = [row.sync for row in ordered]
        alone = statistics.median(seconds for row in rows for seconds in row.alone_seconds)
        more = [1e3 * alone * max(0.0, statistics.median(row.times) - 1) for row in ordered]
        parts += [
            Bars(
                title="Time of a step", x="ms, at the pace of all rounds without communication", rows=names,
                parts=[("without communication", [1e3 * alone] * len(names)), ("more with the sync", more)],
            ),
            Bars(
                title="Sent", x="MB per step, of the busiest rank", rows=names,
                parts=[("sent", [row.sent_bytes / 1e6 for row in ordered])],
            ),
        ]  # fmt: skip
    if trained := [row for row in rows if row.losses]:
        parts += [
            Lines(
                title="Loss after equal tokens", x="steps", y="validation loss",
                curves=[Curve(row.sync, [float(step) for step in row.evaluated_at], row.losses) for row in trained],
            ),
            Lines(
                title="Loss after equal time", x="seconds of steps", y="validation loss",
                curves=[
                    Curve(row.sync, [step * row.step_seconds for step in row.evaluated_at], row.losses)
                    for row in trained
                ],
            ),
        ]  # fmt: skip
    where = (
        f"{rows[0].replicas} replicas x {rows[0].shards} shards, {rows[0].engine}" if rows else "no row was finished"
    )
    return Page(name, where, [*parts, table], table=table, warnings=[line for line in lines if "INVALID" in line])


def _cells(row: TrainRow) -> list[str]:
    low, high = interval(row.times)
    return [
        row.sync, f"{1e3 * row.step_seconds:,.2f}", f"{1e3 * statistics.median(row.alone_seconds):,.2f}",
        f"{statistics.median(row.times):.3f}", f"{low:.3f}-{high:.3f}", f"{row.noise:.1%}", f"{row.utilization:.1%}",
        f"{row.exposed_seconds / row.step_seconds:.1%}", f"{row.sent_bytes:,}",
        f"{row.dense_bytes / row.sent_bytes:,.1f}x" if row.sent_bytes else "-",
        f"{row.losses[-1]:.4f}" if row.losses else "-", row.invalid or "-",
    ]  # fmt: skip
