"""Simulated rows as text."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.simulation.sweep import Row

__all__ = ["head", "line", "summary"]


def head(swept: Sequence[str]) -> str:
    """The head of the table; ``swept``: the words that differ."""
    names = "".join(f"{name:<24} " for name in swept)
    return (
        f"{names}{'replicas':>8} {'step s':>9} {'utilization':>11} {'exposed':>8} {'sent/step':>10} {'goodput':>8} "
        f"{'tokens/s':>11} {'hours':>9}"
    )


def line(row: Row) -> str:
    """One row under `head`."""
    names = "".join(f"{value[:24]:<24} " for value in row.swept.values())
    notes = []
    if row.utilization_low != row.utilization_high:
        notes.append(f"{row.utilization_low:.1%} to {row.utilization_high:.1%}")
        if row.hours:
            notes.append(f"{row.hours_low:,.1f} to {row.hours_high:,.1f} h")
    if row.extrapolated:
        notes.append(row.extrapolated)
    tokens = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-"
    hours = f"{row.hours:,.1f}" if row.hours else "-"
    return (
        f"{names}{row.replicas:>8,} {row.step_seconds:>9.4g} {row.utilization:>11.1%} {row.exposed:>8.1%} "
        f"{bytes_of(row.sent_bytes):>10} {row.goodput:>8.1%} {tokens:>11} {hours:>9}  {'; '.join(notes)}".rstrip()
    )


def summary(rows: Sequence[Row], said: Sequence[str]) -> list[str]:
    """The lines below the table."""
    lines = list(said)
    if any(row.extrapolated for row in rows):
        lines.append("rows that are extrapolated have the calibration's error and what more ranks add to it, which is "
                     "not known")  # fmt: skip
    if rows and rows[0].utilization_low == rows[0].utilization_high:
        lines.append("links are as described; intervals come with calibrate=FOLDER, of a dtrain bench collectives")
    if any(row.failures for row in rows):
        fewest = min(row.failures for row in rows)
        lines.append(f"each row has {fewest} failures or more; their moments are drawn, from seed=")
    return lines


def bytes_of(number: float) -> str:
    """
    >>> bytes_of(1234567)
    '1.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
