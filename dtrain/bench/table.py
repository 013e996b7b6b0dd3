"""A sweep as a person reads it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from dtrain.bench.fit import HOPS, fit
from dtrain.bench.rows import Row

__all__ = ["HEAD", "fits", "line"]

HEAD = (
    f"{'op':<16} {'ranks':>5} {'bytes':>11} {'iter':>4} {'p50 ms':>9} {'p95 ms':>9} {'max ms':>9} {'algbw':>8} "
    f"{'busbw':>8} {'of link':>7} {'sent/opt':>8} {'wrong':>5}  slowest    (bandwidths in Mbit/s)"
)


def line(row: Row) -> str:
    """One row under ``HEAD``."""
    link = f"{row.of_link:.1%}" if row.link_mbit else "-"
    ratio = f"{row.sent_bytes / row.optimal_bytes:.2f}" if row.optimal_bytes else "-"
    invalid = f"  INVALID: {row.invalid}" if row.invalid else ""
    return (
        f"{row.op:<16} {row.world:>5} {row.bytes:>11,} {row.iterations:>4} {row.p50_ms:>9.3f} {row.p95_ms:>9.3f} "
        f"{row.max_ms:>9.3f} {row.algbw_mbit:>8.1f} {row.busbw_mbit:>8.1f} {link:>7} {ratio:>8} {row.wrong:>5}  "
        f"{row.slowest_rank}@{row.slowest_host}{invalid}"
    )


def fits(rows: Sequence[Row]) -> list[str]:
    """Alpha and beta of each op whose steps are known, or why there is none."""
    out = []
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op and not row.invalid]
        seconds = {row.bytes: row.p50_ms / 1e3 for row in of_op}
        if op not in HOPS or len(seconds) < 3:
            continue
        found = fit(op, of_op[0].world, seconds)
        if found.usable:
            rate = 8 / found.beta / 1e6
            out.append(
                f"{op}: alpha {1e3 * found.alpha:.3f} ms one way, beta {rate:.1f} Mbit/s "
                f"(median residual {found.residual:.1%})"
            )
        else:
            out.append(f"{op}: no fit: the model is off by {found.residual:.0%} (median), more than 15 %")
    return out


def summary(rows: Sequence[Row]) -> list[str]:
    """What follows the table: fits, and what is wrong with the measurement."""
    out = fits(rows)
    wrong = sum(row.wrong for row in rows)
    if wrong:
        out.append(f"{wrong} values were WRONG: do not trust this transport")
    slow = [row.slowest_rank for row in rows]
    if len(rows) >= 6 and (most := statistics.mode(slow)) is not None and slow.count(most) > 0.8 * len(slow):
        host = next(row.slowest_host for row in rows if row.slowest_rank == most)
        out.append(f"rank {most} on {host} was the slowest in {slow.count(most)} of {len(slow)} rows")
    return out
