"""``dtrain compare``: runs beside each other, as a table and as one HTML file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import add_verb
from dtrain.errors import ConfigError
from dtrain.extras import OF_LAUNCHING, OF_REPORTS, require

if TYPE_CHECKING:
    from dtrain.cli import Verbs

EPILOG = """\
The page shows loss against steps, bytes and hours, where the time of a step went, what was sent, and the settings in
which the runs differ. It opens from disk and loads nothing. A run that still goes on is shown as far as it is.

examples:
  dtrain compare runs/dense runs/diloco                    writes compare.html
  dtrain compare runs/2026-12-01 --out ../december.html    every run below the folder, or of a sweep
  dtrain compare runs/x                                    draws runs/x/report.html again
"""


def add(verbs: Verbs) -> None:
    """Add ``compare``."""
    verb = add_verb(verbs, "compare", does="compare runs: a table, and a page of plots", epilog=EPILOG)
    verb.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, a sweep's, or one with runs below it")
    verb.add_argument("--out", type=Path, metavar="FILE", help="(default: compare.html; of one run its report.html)")
    verb.set_defaults(run=_compare)


def _compare(chosen: argparse.Namespace) -> int:
    require([*OF_LAUNCHING, *OF_REPORTS])
    from dtrain.report.run_figures import read_run, read_runs
    from dtrain.report.run_page import page_of_run, page_of_runs

    named = _named([Path(name).expanduser() for name in [*chosen.runs, *chosen.words]])
    if len(named) == len(chosen.runs) + len(chosen.words):  # each was named by itself
        runs, without = [read_run(folder, name) for name, folder in named], list[str]()
    else:
        runs, without = read_runs(named)
    if len(runs) == 1 and not without:
        page, out = page_of_run(runs[0]), chosen.out or runs[0].folder / "report.html"
    else:
        page, out = page_of_runs(runs, notes=without), chosen.out or Path("compare.html")
    print(page.text())
    try:
        page.write(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}; name another file") from error
    print(f"report: {out.absolute()}")
    return 0


def _named(places: Sequence[Path]) -> list[tuple[str, Path]]:
    """The runs in or below these folders, each with a name that tells it from the others.

    Raises:
        ConfigError: a folder that does not exist, or has no run in it.
    """
    from dtrain.report.comparing import runs_below

    folders: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place} is no folder; give the folder of a run: the run.dir of its command")
        below = runs_below(place)
        if not below:
            raise ConfigError(f"{place} is no run, and has none below it: a run's folder has a config.yaml")
        folders.update(dict.fromkeys(folder.resolve() for folder in below))
    if len(folders) == 1:
        return [("", folder) for folder in folders]
    common = Path(os.path.commonpath([folder.parent for folder in folders]))
    return [(str(folder.relative_to(common)), folder) for folder in folders]
