"""``dtrain jobs``: list every launcher's jobs, show their states and logs, and diagnose failures."""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import add_verb
from dtrain.cli.login_host import enter_login_host
from dtrain.errors import ConfigError, DtrainError

if TYPE_CHECKING:
    from dtrain.cli import Verbs
    from dtrain.launchers.job import Job

EPILOG = """\
A job is named by its id, by the name it was given, or by its folder; a job of another cluster, or of one that went
down, by its folder only. What it was waiting for when it hung, and the error that made the others fail, comes first in
`why`. The number of a job array stands for all its elements.

examples:
  dtrain jobs list          dtrain jobs logs 1234 -f          dtrain jobs why runs/x
  dtrain jobs table runs/2026-11-20                  dtrain jobs table runs/a runs/b 'runs/lr-*'
"""
DOES = {
    "list": "the jobs and runs that were started from this machine, here or on this cluster",
    "status": "where a job stands",
    "logs": "what a job has printed",
    "cancel": "end a job, for good",
    "why": "why a job failed, or what it is waiting for",
    "table": "runs beside each other: what differs in their settings, and their closing figures",
}


def add(verbs: Verbs) -> None:
    """Add ``jobs`` and its verbs."""
    below = add_verb(verbs, "jobs", does="list, watch, cancel and diagnose jobs", epilog=EPILOG).add_subparsers(
        required=True, metavar="VERB"
    )
    for name, does in DOES.items():
        verb = add_verb(below, name, does=does)
        verb.set_defaults(run=_run, verb=name)
        if name != "list":
            several = "a sweep's folder or the id of its job array; or any folders of runs, patterns too: 'runs/*'"
            what = several if name == "table" else "its id, its name, or its folder"
            verb.add_argument("job", metavar="ID", nargs="+" if name == "table" else None, help=what)
        else:
            verb.add_argument("--all", action="store_true", help="those of other clusters, too, and those replaced")
        if name == "logs":
            verb.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
            verb.add_argument("--rank", type=int, help="only this rank (default: all, with the script's own lines)")


def _run(chosen: argparse.Namespace) -> int:
    from dtrain.launchers import job_list as registry
    from dtrain.launchers.job import SchedulerError

    if chosen.words and chosen.verb != "table":
        raise ConfigError(f"{' '.join(chosen.words)}: one job at a time")
    if not _is_of_this_machine(chosen):
        enter_login_host(sys.argv[1:])
    try:
        if chosen.verb == "list":
            return _list(registry.every() if chosen.all else registry.jobs(), everywhere=chosen.all)
        if chosen.verb == "table":
            print(_table([*chosen.job, *chosen.words]))
            return 0
        return VERBS[chosen.verb](registry.resolve(chosen.job), chosen)
    except registry.Replaced as error:
        if chosen.verb != "status":
            raise ConfigError(str(error)) from error
        print(error)
        return 0
    except LookupError as error:
        raise ConfigError(str(error)) from error
    except SchedulerError as error:
        raise DtrainError(str(error)) from error


def _is_of_this_machine(chosen: argparse.Namespace) -> bool:
    """Whether the job is named by a folder and belongs to no cluster, so that no cluster need be up."""
    from dtrain.launchers.job import Facts
    from dtrain.launchers.registry import job_class

    name = getattr(chosen, "job", None)  # `list` names none, `table` several
    try:
        return isinstance(name, str) and not job_class(Facts.read(Path(name)).launcher).scheduled
    except (OSError, ValueError):
        return False


def _list(jobs: Sequence[Job], *, everywhere: bool) -> int:
    from dtrain.launchers import job_list as registry

    rows = [("id", "launcher", "name", "state", "submitted", *(("cluster",) if everywhere else ()), "folder")]
    for job in jobs:
        when = time.strftime("%m-%d %H:%M", time.localtime(job.facts.submitted))
        now = registry.replaced_by(job)
        state = _state(job) if now is None else f"now {now.id}"
        cluster = (job.facts.cluster or "-",) if everywhere else ()
        rows.append((job.id, job.facts.launcher, job.facts.name, state, when, *cluster, str(job.folder)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]))
    return 0


def _table(names: Sequence[str]) -> str:
    """The table of a sweep, or of all runs that the names stand for."""
    from dtrain.cli.sweep import FILE, table
    from dtrain.report.comparing import compared, runs_below, settings_of

    places = [place for name in names for place in _places(name)]
    if len(places) == 1 and (places[0] / FILE).exists():
        return table(places[0])
    folders = list(dict.fromkeys(run for place in places for run in runs_below(place)))
    if not folders:
        raise ConfigError(f"there is no run in {' '.join(map(str, places))}: a run's folder has a config.yaml")
    common = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    runs = [(str(folder.absolute().relative_to(common)), folder) for folder in folders]
    return compared(runs, {folder: settings_of(folder) for folder in folders})


def _places(name: str) -> list[Path]:
    """The folders that a name stands for: itself, those that match a pattern, or that of a job or its sweep."""
    from dtrain.cli.sweep import FILE
    from dtrain.launchers import job_list as registry

    path = Path(name).expanduser()
    if os.path.isdir(path):
        return [path]
    places = [Path(place) for place in sorted(glob.glob(str(path), recursive=True)) if os.path.isdir(place)]
    if places:
        return places
    folders = [job.folder for job in registry.resolve(name)]
    sweep = next((parent for parent in folders[0].parents if (parent / FILE).is_file()), None)
    return folders if sweep is None else [sweep]


def _state(job: Job) -> str:
    from dtrain.launchers.job import SchedulerError

    try:
        return job.state()
    except SchedulerError:
        return "unknown"


def _one(jobs: Sequence[Job], chosen: argparse.Namespace) -> Job:
    """The only job. Raises ``ConfigError`` for the elements of an array."""
    if len(jobs) > 1:
        ids = " ".join(job.id for job in jobs)
        raise ConfigError(f"{chosen.job} is a job array; `dtrain jobs {chosen.verb}` takes one element of it: {ids}")
    return jobs[0]


def _status(jobs: Sequence[Job], chosen: argparse.Namespace) -> int:
    from dtrain.launchers.records import Beat, RankRecord

    if len(jobs) > 1:
        print(f"job array {chosen.job} ({jobs[0].facts.launcher}) {jobs[0].facts.name}: {len(jobs)} jobs")
        return _list(jobs, everywhere=False)
    job, state = jobs[0], jobs[0].state()
    print(f"job {job.id} ({job.facts.launcher}) {job.facts.name}: {state}")
    print(f"  folder: {job.folder}")
    nodes, reason = job.nodes(), job.waits_for()
    if nodes:
        print(f"  nodes: {nodes}")
    if reason:
        print(f"  waits for: {reason}")
    beats = {beat.rank: beat for beat in Beat.all(job.folder)}
    for record in RankRecord.all(job.folder):
        how = "runs" if record.ended is None else f"ended with {record.signal or f'exit code {record.exit_code}'}"
        if record.ended is None and state not in ("running", "lost"):
            how = "wrote no exit record"
        beat = beats.get(record.rank)
        seen = f", last sign of life {time.time() - beat.time:.0f} s ago" if beat and record.ended is None else ""
        print(f"  rank {record.rank} on {record.host}: attempt {record.attempt + 1} {how}{seen}")
    return 0


def _logs(jobs: Sequence[Job], chosen: argparse.Namespace) -> int:
    from dtrain.cli.follow import follow

    job = _one(jobs, chosen)
    if chosen.follow:
        return follow(job)
    wanted = None if chosen.rank is None else f"rank-{chosen.rank}.log"
    paths = [path for path in job.logs() if wanted in (None, path.name)]
    if not paths:
        raise ConfigError(
            f"job {job.id} has no log{f' of rank {chosen.rank}' if wanted else ''} yet: {job.folder}/logs"
        )
    for path in paths:
        if len(paths) > 1:
            print(f"==== {path} ====")
        print(path.read_text(errors="replace"), end="")
    return 0


def _cancel(jobs: Sequence[Job], _: argparse.Namespace) -> int:
    from dtrain.launchers.job import ENDED

    for job in jobs:
        state = _state(job)
        if state in ENDED and (len(jobs) > 1 or state != "lost"):  # cancel() reports more of a lost one
            print(f"job {job.id} has ended already")
            continue
        job.cancel()
        print(f"job {job.id} ({job.folder}): asked to end; it is not started again")
    return 0


def _why(jobs: Sequence[Job], _: argparse.Namespace) -> int:
    for job in jobs:
        if len(jobs) > 1:
            print(f"==== job {job.id}: {job.folder} ====")
        print(job.why())
    return 0


VERBS = {"status": _status, "logs": _logs, "cancel": _cancel, "why": _why}
