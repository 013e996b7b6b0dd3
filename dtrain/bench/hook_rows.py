"""A row of `dtrain bench hooks`, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.bench.rows import Row
from dtrain.report.at_the_end import REPORT, drawn
from dtrain.report.page import Notes, Page, Part, Table
from dtrain.report.plots import Bars

__all__ = ["HEAD", "NCCL_ONLY", "HookRow", "line", "report", "summary"]

BASELINE = "torch.all_reduce"
NCCL_ONLY = ("torch.bf16",)
"""Hooks that torch refuses to run over gloo."""
COLUMNS = (
    "hook", "bytes", "p50 ms", "p95 ms", "wire bytes", "less", "error", "encode", "exchange", "decode", "wrong",
    "invalid",
)  # fmt: skip
HEAD = (
    f"{'hook':<24} {'ranks':>5} {'bytes':>11} {'iter':>4} {'p50 ms':>9} {'p95 ms':>9} {'vs fp32':>8} "
    f"{'algbw Mbit/s':>12} {'busbw Mbit/s':>12} {'of link':>7} {'wire bytes':>11} {'less':>7} {'error':>8} "
    f"{'encode':>6} {'exch.':>6} {'decode':>6} {'#wrong':>6}"
)


@dataclass(frozen=True, kw_only=True)
class HookRow(Row):
    """``op``: the hook. ``bytes``: of the fp32 gradient. ``optimal_bytes``: of an all-reduce of it, per rank.

    ``wire_bytes``: payload that a rank sends for one exchange, exactly; for torch's hooks what the interface counted.
    ``error``: of the first exchange, its distance from the mean relative to the mean's norm. ``encode``, ``exchange``,
    ``decode``: fractions of the exchange's time, with combining and encoding again in decode; zeros where it is not
    timed.
    """

    wire_bytes: int
    error: float
    encode: float
    exchange: float
    decode: float

    @property
    def less(self) -> float:
        """How many times fewer bytes than an optimal all-reduce in fp32 sends."""
        return self.optimal_bytes / self.wire_bytes if self.wire_bytes else 0.0


def line(row: HookRow, others: Sequence[HookRow]) -> str:
    """One row under ``HEAD``; ``others``: the rows so far; torch's fp32 all-reduce among them is the baseline."""
    plain = next((other for other in others if other.op == BASELINE and other.bytes == row.bytes), None)
    faster = f"{plain.p50_ms / row.p50_ms:.2f}x" if plain is not None else "-"
    link = f"{row.of_link:.1%}" if row.link_mbit else "-"
    shares = [f"{share:.0%}" if row.exchange else "-" for share in (row.encode, row.exchange, row.decode)]
    invalid = f"  INVALID: {row.invalid}" if row.invalid else ""
    return (
        f"{row.op:<24} {row.world:>5} {row.bytes:>11,} {row.iterations:>4} {row.p50_ms:>9.3f} {row.p95_ms:>9.3f} "
        f"{faster:>8} {row.algbw_mbit:>12.1f} {row.busbw_mbit:>12.1f} {link:>7} {row.wire_bytes:>11,} "
        f"{row.less:>6.1f}x {row.error:>8.1e} {shares[0]:>6} {shares[1]:>6} {shares[2]:>6} {row.wrong:>6}{invalid}"
    )


def summary(rows: Sequence[HookRow]) -> list[str]:
    """The lines below the table: what its figures are, and what is wrong with the measurement."""
    if not rows:
        return ["no row was finished"]
    link = f"{rows[0].link_mbit:g} Mbit/s" if rows[0].link_mbit else "not known (bench.link=100mbit tells it)"
    out = [
        "times are of a backward pass whose gradient is exchanged; algbw and busbw are those of the fp32 gradient, so "
        f"that compression makes them larger than a link's rate: {link}",
        "error: of the first exchange, before feedback has made up for anything (torch.powersgd's is plain yet); "
        f"wire bytes of torch's hooks are what the interface {rows[0].interface} counted, headers included",
    ]
    if any(row.interface == "lo" for row in rows):
        out.append("these ranks share a machine: its memory and processors were measured, and no link")
    if rows[0].backend != "nccl":
        out.append(f"{', '.join(NCCL_ONLY)} runs over NCCL only, and is left out here")
    if wrong := sum(row.wrong for row in rows):
        out.append(f"{wrong} values were WRONG: do not trust these hooks here")
    if invalid := [row for row in rows if row.invalid]:
        out.append(f"{len(invalid)} of {len(rows)} rows are INVALID; free the machine and repeat")
    return out


def report(folder: Path, rows: Sequence[HookRow], lines: Sequence[str]) -> str:
    """Draw report.html; returns the line that tells of it. ``lines``: those below the table."""
    again = f"dtrain bench hooks run.dir={folder} measures again"
    return drawn(folder / REPORT, lambda: page("/".join(folder.parts[-2:]), rows, lines), again=again)


def page(name: str, rows: Sequence[HookRow], lines: Sequence[str]) -> Page:
    """For each size the time of each hook, split where it was timed, and its bytes; all rows in a table."""
    parts: list[Part] = [Notes(lines)]
    for size in dict.fromkeys(row.bytes for row in rows):
        of_size = sorted((row for row in rows if row.bytes == size), key=lambda row: row.p50_ms)
        names = [row.op for row in of_size]
        split = [
            (what, [row.p50_ms * getattr(row, what) for row in of_size]) for what in ("encode", "exchange", "decode")
        ]
        rest = [row.p50_ms * max(0.0, 1 - row.encode - row.exchange - row.decode) for row in of_size]
        parts += [
            Bars(title=f"Time, {size:,} bytes", x="ms, median", rows=names, parts=[*split, ("not timed apart", rest)]),
            Bars(
                title=f"Sent, {size:,} bytes", x="MB per rank", rows=names,
                parts=[("sent", [row.wire_bytes / 1e6 for row in of_size])],
            ),
        ]  # fmt: skip
    table = Table(COLUMNS, [_cells(row) for row in rows], title="Rows")
    ranks = f"{rows[0].world} ranks, {rows[0].backend}" if rows else "no row was finished"
    warnings = [line for line in lines if "INVALID" in line or "WRONG" in line]
    return Page(name, ranks, [*parts, table], table=table, warnings=warnings)


def _cells(row: HookRow) -> list[str]:
    shares = [f"{share:.0%}" if row.exchange else "-" for share in (row.encode, row.exchange, row.decode)]
    return [
        row.op, f"{row.bytes:,}", f"{row.p50_ms:,.3f}", f"{row.p95_ms:,.3f}", f"{row.wire_bytes:,}",
        f"{row.less:.1f}x", f"{row.error:.1e}", *shares, f"{row.wrong}", row.invalid or "-",
    ]  # fmt: skip
