"""The rows of a benchmark, printed as its job writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from dtrain.launchers.exit_codes import INTERRUPTED

if TYPE_CHECKING:
    from dtrain.bench.rows import Measured
    from dtrain.launchers.job import Job

R = TypeVar("R", bound="Measured")


@dataclass(frozen=True)
class Shown(Generic[R]):
    """How to show rows of one kind. ``line``: of a row, given those so far. ``report``: draws the page."""

    kind: type[R]
    head: str
    line: Callable[[R, Sequence[R]], str]
    summary: Callable[[Sequence[R]], list[str]]
    report: Callable[[Path, Sequence[R], Sequence[str]], str]


def show_rows(job: Job, folder: Path, how: Shown[R]) -> int:
    """Print rows as they come; Ctrl-C, or SIGTERM, ends the job and keeps the rows so far."""
    from dtrain.bench import rows
    from dtrain.cli.follow import LOOK_SECONDS, exit_code, sigterm_interrupts
    from dtrain.launchers.job import ENDED

    print(f"job {job.id}: {folder}\n{how.head}", flush=True)
    shown: list[R] = []

    def look() -> None:
        for row in rows.read_as(folder / "rows.jsonl", how.kind)[len(shown) :]:
            shown.append(row)
            print(how.line(row, shown), flush=True)

    try:
        with sigterm_interrupts():
            while job.state() not in ENDED:
                look()
                time.sleep(LOOK_SECONDS)
        code = exit_code(job)
    except KeyboardInterrupt:
        job.cancel()
        code = INTERRUPTED
    look()
    if code == INTERRUPTED:
        print("interrupted: these rows are all that were finished")
    lines = how.summary(shown)
    print("\n".join(lines))
    print(f"rows: {folder / 'rows.jsonl'}\n{how.report(folder, shown, lines)}")
    return code or int(any(row.wrong for row in shown))
