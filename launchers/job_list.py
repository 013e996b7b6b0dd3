"""The jobs that this user has submitted from this machine, so that ``dtrain jobs`` finds them by their id.

A small file for each job, in $XDG_STATE_HOME/dtrain/jobs (~/.local/state by default), holds what was submitted; all
else is in its folder. Deleting the folder removes the job.

An id names a job of one cluster only: where that went down, or is not the one that is asked from here, the job is found
by its folder alone. Where several jobs have the same id or name, the one that has not ended is meant.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dtrain.launchers import registry
from dtrain.launchers.job import ENDED, Facts, Job
from dtrain.launchers.lock import LOCK
from dtrain.launchers.strict_json import Damaged, json_in, tail

__all__ = [
    "SWEEP", "Replaced", "add", "every", "find", "holder", "job_of", "jobs", "replaced_by", "resolve", "run_of",
]  # fmt: skip

SWEEP = "sweep.json"
"""In the folder of a sweep: its runs."""
RUN = "config.yaml"
"""In the folder of a run: its configuration."""


class Replaced(LookupError):
    """The job has ended, and its folder is another job's now."""


def folder() -> Path:
    """Where the records lie."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dtrain" / "jobs"


def add(facts: Facts) -> None:
    """Record a job, with the cluster that it was given to; prints a warning where that fails."""
    located = registry.job_class(facts.launcher).located(facts)
    if located != facts:
        facts = located
        facts.write()
    name = f"{facts.launcher}-{facts.cluster or 'here'}-{facts.submitted:.0f}-{facts.id}"
    try:
        folder().mkdir(parents=True, exist_ok=True)
        (folder() / name).write_text(json.dumps(dataclasses.asdict(facts)) + "\n")
    except (OSError, RuntimeError) as error:  # a home over its quota, or none at all; the job runs nevertheless
        print(
            f"dtrain: warning: job {facts.id} runs, but the list of jobs cannot be written to ({error}): it is found "
            f"by its folder, dtrain jobs status {facts.folder}",
            file=sys.stderr,
        )


def every() -> list[Job]:
    """All jobs whose folders are still there, newest first: those of other clusters, too, and those replaced."""
    records = [facts for path in folder().glob("*") if (facts := _record(path)) is not None]
    records = [facts for facts in records if os.path.isfile(Path(facts.folder) / "job.json")]
    return [registry.open_job(facts) for facts in sorted(records, key=lambda facts: -facts.submitted)]


def _record(path: Path) -> Facts | None:
    try:
        content = json_in(path)
        if content is not None:
            return Facts.of(content)
        facts = Facts.read(Path(tail(path, 4096).strip()))  # version 0.1 wrote the folder alone
    except (OSError, ValueError):
        return None
    return facts if path.name.endswith(f"-{facts.id}") else None


def jobs() -> list[Job]:
    """The jobs of this machine and of the cluster that is asked from here, newest first."""
    return [job for job in every() if job.is_here() and replaced_by(job) is None]


def replaced_by(job: Job) -> Facts | None:
    """The job whose folder it is now; None where it is still this job's."""
    try:
        current = Facts.read(job.folder)
    except (OSError, ValueError):
        return None
    same = (current.id, current.launcher) == (job.id, job.facts.launcher) and current.submitted <= job.facts.submitted
    return None if same else current


def holder(path: Path) -> Job | None:
    """The job of a folder that has not ended."""
    try:
        job = registry.open_job(Facts.read(path.absolute()))
    except (OSError, ValueError):
        return None
    return job if job.state() not in ENDED else None


def job_of(path: Path) -> Job | None:
    """The job or the run of a folder, whether it has ended or not; None if it holds none that can be read."""
    try:
        return _in_folder(path.absolute())
    except (OSError, LookupError):
        return None


def find(name: str) -> Job:
    """The job with this id or name, or of this folder. Raises ``LookupError`` as `resolve`, and for a job array."""
    matching = resolve(name)
    if len(matching) > 1:
        ids = ", ".join(job.id for job in matching)
        raise LookupError(f"{name} is a job array: say which of its elements ({ids})")
    return matching[0]


def resolve(name: str) -> list[Job]:
    """As `find`; of a job array all elements, in order.

    Raises ``Replaced``, and ``LookupError`` naming the jobs that there are, or those that ``name`` may mean.
    """
    path = Path(name)
    if os.path.exists(path / "job.json") or os.path.exists(path / RUN):
        return [_in_folder(path.absolute())]
    started = every()
    if os.path.isfile(path / SWEEP):
        runs = [job for job in started if path.resolve() in Path(job.folder).resolve().parents and not replaced_by(job)]
        if runs:
            return sorted(runs, key=lambda job: job.facts.submitted)
    matching = [job for job in started if name in (job.id, job.facts.name, job.id.partition("_")[0])]
    local = [job for job in matching if job.is_here()]
    current = [job for job in local if replaced_by(job) is None]
    if current:
        return _meant(name, current)
    for job in local:
        now = replaced_by(job)
        if now is not None:
            raise Replaced(f"job {name} has ended: its folder {job.folder} went on as job {now.id}")
    if matching:
        listed = "".join(f"\n  {_described(job)}" for job in matching[:10])
        raise LookupError(f"there is no job {name} here. Jobs of other clusters are named by their folders:{listed}")
    ids = ", ".join(job.id for job in jobs()[:10])
    hint = f"there are {ids}" if ids else "none was started from this machine"
    if os.path.isdir(path):
        raise LookupError(f"{name} is a folder, but no job's and no run's: it has neither job.json nor config.yaml")
    raise LookupError(f"there is no job {name} ({hint}); give an id, or the folder of a job or a run")


def run_of(folder: Path) -> Job | None:
    """The run of a folder in which no job was written down; None if there is none."""
    if not (folder / RUN).is_file():
        return None
    holder = re.search(r"process ([0-9]{1,18}) on ", tail(folder / LOCK, 4096))
    return registry.open_job(
        Facts(
            id=holder[1] if holder else "0", launcher=registry.FOREGROUND, name=folder.name, folder=str(folder),
            program=(), workers=0, submitted=(folder / RUN).stat().st_mtime,
        )
    )  # fmt: skip


def _in_folder(path: Path) -> Job:
    try:
        return registry.open_job(Facts.read(path))
    except FileNotFoundError:
        run = run_of(path)
        if run is None:
            raise LookupError(f"{path} is neither a job's folder nor a run's") from None
        return run
    except (OSError, Damaged) as error:
        raise LookupError(f"{path / 'job.json'} is damaged ({error}): nobody can say what it was") from error


def _meant(name: str, matching: Sequence[Job]) -> list[Job]:
    """Of several jobs with the same id or name the one that is meant. Raises ``LookupError`` if unclear."""
    units: dict[tuple[str, ...], list[Job]] = {}
    for job in matching:  # newest first; the elements of an array are one
        number, array, _ = job.id.partition("_")
        units.setdefault(
            ("array", number) if array and name != job.id else ("job", job.id, job.facts.folder), []
        ).append(job)
    chosen = list(units.values())
    if len(chosen) > 1:
        live = [unit for unit in chosen if any(job.state() not in ENDED for job in unit)]
        numbered = [unit for unit in chosen if name in (unit[0].id, unit[0].id.partition("_")[0])]
        chosen = live or numbered or chosen[:1]  # of jobs of one name that have ended the newest
    if len(chosen) > 1:
        listed = "".join(f"\n  {_described(job)}" for unit in chosen for job in unit[:1])
        raise LookupError(f"{name} names {len(chosen)} jobs; say which, by id or folder:{listed}")
    return sorted(chosen[0], key=lambda job: int(job.id.partition("_")[2] or 0))


def _described(job: Job) -> str:
    return f"{job.id} ({job.facts.launcher}) {job.facts.name}, cluster {job.facts.cluster or '-'}: {job.folder}"
