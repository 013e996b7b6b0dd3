"""A row as a sweep gives it, for tests."""

from __future__ import annotations

import dataclasses

from dtrain.bench.rows import Row

ROW = Row(
    op="all_reduce", backend="gloo", dtype="float32", world=4, bytes=1_000_000, iterations=20, min_ms=119.2,
    p50_ms=125.0, p95_ms=130.0, p99_ms=131.0, max_ms=131.0, algbw_mbit=64.0, busbw_mbit=96.0, interface="eth0",
    sent_bytes=1_530_000, optimal_bytes=1_500_000, link_mbit=100.0, slowest_rank=2, slowest_host="c3",
    slowest_by=0.013, wrong=0, cpu_busy=0.2, cpu_foreign=0.01,
)  # fmt: skip


def sample(**changes: object) -> Row:
    return dataclasses.replace(ROW, **changes)  # type: ignore[arg-type]  # names of its fields
