"""``dtrain jobs``: every launcher's jobs: what there is, how it goes, what it printed, why it failed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.commands import add_verb
from dtrain.commands.entering import enter_login_host
from dtrain.errors import ConfigError, DtrainError

if TYPE_CHECKING:
    from dtrain.commands import Verbs
    from dtrain.launchers.job import Job

EPILOG = """\
A job is named by its id, by the name it was given, or by its folder. What it was waiting for when it hung, and the
error that made the others fail, comes first in `why`.

examples:
  dtrain jobs list          dtrain jobs logs 1234 -f          dtrain jobs why runs/x
"""
DOES = {
    "list": "the jobs that were submitted from this machine",
    "status": "where a job stands",
    "logs": "what a job has printed",
    "cancel": "end a job, for good",
    "why": "why a job failed, or what it is waiting for",
    "table": "the runs of a sweep, with their closing figures",
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
            verb.add_argument("job", metavar="ID", help="its id, its name, or its folder; for table the sweep's folder")
        if name == "logs":
            verb.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
            verb.add_argument("--rank", type=int, help="only this rank (default: all, with the script's own lines)")


def _run(chosen: argparse.Namespace) -> int:
    from dtrain.launchers import registry
    from dtrain.launchers.slurm.client import SlurmError

    if chosen.words:
        raise ConfigError(f"{' '.join(chosen.words)}: one job at a time")
    enter_login_host(sys.argv[1:])
    try:
        if chosen.verb == "list":
            return _list(registry.jobs())
        if chosen.verb == "table":
            from dtrain.commands.sweeping import table

            print(table(Path(chosen.job)))
            return 0
        return VERBS[chosen.verb](registry.find(chosen.job), chosen)
    except LookupError as error:
        raise ConfigError(str(error)) from error
    except SlurmError as error:
        raise DtrainError(str(error)) from error


def _list(jobs: list[Job]) -> int:
    rows = [("id", "launcher", "name", "state", "submitted", "folder")]
    for job in jobs:
        when = time.strftime("%m-%d %H:%M", time.localtime(job.facts.submitted))
        rows.append((job.id, job.facts.launcher, job.facts.name, _state(job), when, str(job.folder)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), row[5]]))
    return 0


def _state(job: Job) -> str:
    from dtrain.launchers.slurm.client import SlurmError

    try:
        return job.state()
    except SlurmError:
        return "unknown"


def _status(job: Job, _: argparse.Namespace) -> int:
    from dtrain.launchers.record import Beat, RankRecord

    print(f"job {job.id} ({job.facts.launcher}) {job.facts.name}: {job.state()}")
    print(f"  folder: {job.folder}")
    nodes = getattr(job, "nodes", lambda: "")()
    if nodes:
        print(f"  nodes: {nodes}")
    beats = {beat.rank: beat for beat in Beat.all(job.folder)}
    for record in RankRecord.all(job.folder):
        how = "runs" if record.ended is None else f"ended with {record.signal or f'exit code {record.exit_code}'}"
        beat = beats.get(record.rank)
        seen = f", last sign of life {time.time() - beat.time:.0f} s ago" if beat and record.ended is None else ""
        print(f"  rank {record.rank} on {record.host}: attempt {record.attempt + 1} {how}{seen}")
    return 0


def _logs(job: Job, chosen: argparse.Namespace) -> int:
    from dtrain.commands.following import follow

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


def _cancel(job: Job, _: argparse.Namespace) -> int:
    job.cancel()
    print(f"job {job.id}: asked to end; it is not started again")
    return 0


def _why(job: Job, _: argparse.Namespace) -> int:
    print(job.why())
    return 0


VERBS = {"status": _status, "logs": _logs, "cancel": _cancel, "why": _why}
