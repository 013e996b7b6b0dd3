"""What a run leaves for people when it ends: its closing text, and report.html in its folder.

Whatever goes wrong with a page ends no run.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.report import summary

if TYPE_CHECKING:
    from dtrain.report.page import Page
    from dtrain.train.results import Outcome

__all__ = ["REPORT", "closing", "drawn", "write_report", "write_sweep"]

REPORT = "report.html"


def closing(outcome: Outcome, folder: Path, *, report: bool = False) -> str:
    """The last lines of rank 0's log: the summary, or at which step a signal ended the run. ``report``: whether to draw
    the page, too.
    """
    from dtrain.train.time_limit import TIME_LIMIT

    if outcome.reason == "signal":
        name = "time limit" if outcome.signal == TIME_LIMIT else signal.Signals(outcome.signal).name
        return f"{name}: {'left without a checkpoint' if outcome.withheld else 'checkpointed'} at step {outcome.step}"
    prefix = f"stopped at step {outcome.step} as asked\n" if outcome.reason == "stopped" else ""
    path = folder / "summary.json"
    text = summary.render(summary.read(path)) if path.is_file() else f"finished at step {outcome.step}"
    return "\n".join([prefix + text, *([write_report(folder)] if report else [])])


def write_report(folder: Path) -> str:
    """Draw the page of the run in ``folder``; returns the line that tells of it, or why there is none.

    One that is newer than the run's outcome stays: rank 0 has drawn it already.
    """
    path, outcome = folder / REPORT, folder / "outcome.json"
    if path.is_file() and outcome.is_file() and path.stat().st_mtime >= outcome.stat().st_mtime:
        return f"report: {path}"

    def page() -> Page:
        from dtrain.report.run_figures import read_run
        from dtrain.report.run_page import page_of_run

        return page_of_run(read_run(folder))

    return drawn(path, page, again=f"dtrain compare {folder}")


def write_sweep(folder: Path, runs: Sequence[tuple[str, Path]]) -> str:
    """Draw the page of a sweep, whose runs have these names and folders, as `write_report` does."""

    def page() -> Page:
        from dtrain.report.run_figures import read_runs
        from dtrain.report.run_page import page_of_runs

        figures, left_out = read_runs(runs)
        return page_of_runs(figures, title="/".join(folder.parts[-2:]), notes=left_out)

    return drawn(folder / REPORT, page, again=f"dtrain compare {folder}")


def drawn(path: Path, page: Callable[[], Page], *, again: str) -> str:
    """Draw a page into a file; returns the line that tells of it, or why there is none. ``again``: what tries again."""
    try:
        page().write(path)
    except ModuleNotFoundError as error:
        return f"report: none, as it needs {error.name}: pip install 'dtrain[report]', then {again}"
    except Exception as error:  # of reading, drawing, writing: what it is about has ended as it should
        return f"report: none, as it failed ({type(error).__name__}: {error}); {again}"
    return f"report: {path}"
