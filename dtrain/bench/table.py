"""A sweep as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from dtrain.bench.fit import HOPS, LARGEST_RESIDUAL, fit
from dtrain.bench.rows import NOISE, Row, compare
from dtrain.report.at_the_end import REPORT, drawn
from dtrain.report.page import Notes, Page, Part, Table
from dtrain.report.plots import Curve, Lines

__all__ = ["HEAD", "compared", "fits", "line", "report", "summary"]

HEAD = (
    f"{'op':<15} {'backend':<7} {'ranks':>5} {'bytes':>11} {'iter':>4} {'min ms':>9} {'p50 ms':>9} {'p95 ms':>9} "
    f"{'p99 ms':>9} {'max ms':>9} {'algbw Mbit/s':>12} {'busbw Mbit/s':>12} {'of link':>7} {'sent/opt':>8} "
    f"{'#wrong':>6}  slowest rank"
)
COLUMNS = (
    "op", "bytes", "p50 ms", "p95 ms", "max ms", "algbw Mbit/s", "busbw Mbit/s", "of link", "sent bytes", "wrong",
    "invalid",
)  # fmt: skip
ONE_SIDED = ("broadcast", "shift")
"""Ops in which ranks do not all wait for each other, so that the slowest rank is where the time goes."""


def line(row: Row) -> str:
    """One row under ``HEAD``. Bandwidths are in Mbit/s."""
    link = f"{row.of_link:.1%}" if row.link_mbit else "-"
    ratio = f"{row.sent_bytes / row.optimal_bytes:.2f}" if row.optimal_bytes else "-"
    invalid = f"  INVALID: {row.invalid}" if row.invalid else ""
    return (
        f"{row.op:<15} {row.backend:<7} {row.world:>5} {row.bytes:>11,} {row.iterations:>4} {row.min_ms:>9.3f} "
        f"{row.p50_ms:>9.3f} {row.p95_ms:>9.3f} {row.p99_ms:>9.3f} {row.max_ms:>9.3f} {row.algbw_mbit:>12.1f} "
        f"{row.busbw_mbit:>12.1f} {link:>7} {ratio:>8} {row.wrong:>6}  {_slowest(row)}{invalid}"
    )


def _slowest(row: Row) -> str:
    """The slowest rank and its host, or "-" where ranks differ by no more than noise."""
    return f"{row.slowest_rank} on {row.slowest_host}, {row.slowest_by:+.1%}" if stands_out(row) else "-"


def stands_out(row: Row) -> bool:
    """Whether the slowest rank took longer than the median one by more than measurements of the same thing differ."""
    return row.slowest_by > NOISE - 1


def summary(rows: Sequence[Row]) -> list[str]:
    """The lines below the table: what its figures are, fits, and what is wrong with the measurement."""
    if not rows:
        return ["no row was finished"]
    link = f"{rows[0].link_mbit:g} Mbit/s" if rows[0].link_mbit else "not known (bench.link=100mbit tells it)"
    names = ", ".join(dict.fromkeys(row.interface for row in rows))
    out = [f"bandwidths in Mbit/s (10^6), {rows[0].dtype}, bytes sent counted on {names}, a link's rate: {link}"]
    if "lo" in names.split(", "):
        out.append("these ranks share a machine: its memory and processors were measured, and no link")
    out += fits(rows)
    wrong = sum(row.wrong for row in rows)
    if wrong:
        out.append(f"{wrong} values were WRONG: do not trust this backend")
    invalid = [row for row in rows if row.invalid]
    if invalid:
        out.append(f"{len(invalid)} of {len(rows)} rows are INVALID and left out of fits; free the machine and repeat")
    waiting = [op for op in dict.fromkeys(row.op for row in rows) if op.removeprefix("comm.") not in ONE_SIDED]
    if waiting and rows[0].world > 1:
        out.append(
            f"in {', '.join(waiting)} all ranks wait for the slowest link, so no row tells whose it is: "
            "`dtrain doctor` with the same launcher finds the slow node"
        )
    slow = [row.slowest_rank if stands_out(row) else -1 for row in rows]
    if len(rows) >= 6 and statistics.mode(slow) >= 0 and slow.count(most := statistics.mode(slow)) > 0.8 * len(slow):
        host = next(row.slowest_host for row in rows if row.slowest_rank == most)
        out.append(f"rank {most} on {host} was the slowest in {slow.count(most)} of {len(slow)} rows")
    return out


def report(folder: Path, rows: Sequence[Row], lines: Sequence[str]) -> str:
    """Draw report.html; returns the line that tells of it. ``lines``: those below the table."""
    again = f"dtrain bench collectives run.dir={folder} measures again"
    return drawn(folder / REPORT, lambda: page("/".join(folder.parts[-2:]), rows, lines), again=again)


def page(name: str, rows: Sequence[Row], lines: Sequence[str]) -> Page:
    """Bandwidth and time against size, a curve for each op; all rows in a table."""
    bandwidths, times = [], []
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        sizes = [float(row.bytes) for row in of_op]
        bandwidths.append(Curve(op, sizes, [row.busbw_mbit for row in of_op]))
        low, high = [row.min_ms for row in of_op], [row.p95_ms for row in of_op]
        times.append(Curve(op, sizes, [row.p50_ms for row in of_op], low=low, high=high))
    ends = sorted({float(row.bytes) for row in rows})
    if rows and rows[0].link_mbit:
        rate = rows[0].link_mbit
        bandwidths.append(Curve("the link's rate", [ends[0], ends[-1]], [rate, rate], style="dashed", color=7))
    table = Table(COLUMNS, [_cells(row) for row in rows], title="Rows")
    parts: list[Part] = [
        Lines(title="Bus bandwidth", x="bytes of the whole buffer", y="Mbit/s", log="x", curves=bandwidths),
        Lines(
            title="Time", x="bytes of the whole buffer", y="ms, median", log="xy", curves=times,
            note="shaded: from the fastest iteration to the 95th percentile",
        ),
        table,
    ]  # fmt: skip
    ranks = f"{rows[0].world} ranks, {rows[0].backend}, {rows[0].dtype}" if rows else "no row was finished"
    warnings = [line for line in lines if "INVALID" in line or "WRONG" in line]
    return Page(name, ranks, [Notes(lines), *parts], table=table, warnings=warnings)


def _cells(row: Row) -> list[str]:
    link = f"{row.of_link:.1%}" if row.link_mbit else "-"
    figures = (row.p50_ms, row.p95_ms, row.max_ms)
    return [
        row.op, f"{row.bytes:,}", *(f"{ms:,.3f}" for ms in figures), f"{row.algbw_mbit:,.1f}", f"{row.busbw_mbit:,.1f}",
        link, f"{row.sent_bytes:,}", f"{row.wrong}", row.invalid or "-",
    ]  # fmt: skip


def fits(rows: Sequence[Row]) -> list[str]:
    """Alpha and beta of each op over gloo whose steps are known, or why there is none."""
    out = []
    for op in dict.fromkeys(row.op for row in rows if row.backend == "gloo" and row.world > 1):
        of_op = [row for row in rows if row.op == op and row.backend == "gloo" and not row.invalid]
        if op.removeprefix("comm.") not in HOPS:
            continue
        seconds = {row.bytes: row.p50_ms / 1e3 for row in of_op}
        if len(seconds) < 3:
            out.append(f"{op}: no fit: it takes three valid sizes, there are {len(seconds)}")
            continue
        model = fit(op, of_op[0].world, seconds)
        if model.usable:
            residuals = ", ".join(f"{size:,}: {off:+.0%}" for size, off in model.residuals.items())
            out.append(
                f"{op}: alpha {1e3 * model.alpha:.3f} ms one way, beta {8e-6 / model.beta:.1f} Mbit/s; "
                f"predicted against measured at bytes {residuals}"
            )
        else:
            out.append(
                f"{op}: no fit: alpha and beta do not describe this sweep, at {model.worst:,} bytes they are off by "
                f"{model.residual:.0%} and {LARGEST_RESIDUAL:.0%} is allowed"
            )
    return out


def compared(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """What became slower or faster than in an older sweep."""
    both = compare(rows, baseline)
    if not both:
        return ["the baseline has none of these rows (op, backend, dtype, ranks and bytes must be equal)"]
    out = []
    for row, times in both:
        if not 1 / NOISE <= times <= NOISE:
            word = "slower" if times > 1 else "faster"
            doubt = f", but is INVALID: {row.invalid}" if row.invalid else ""
            out.append(
                f"{word} than the baseline: {row.op} of {row.bytes:,} bytes takes {times:.2f} times as long{doubt}"
            )
    others = f"the other {len(both) - len(out)} of " if out else "all "
    return [*out, f"{others}{len(both)} rows that the baseline has too are within a factor of {NOISE:g}"]
