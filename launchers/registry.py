"""Which jobs this user has submitted from this machine, so that ``dtrain jobs`` finds them by their id.

A small file for each job, in $XDG_STATE_HOME/dtrain/jobs (~/.local/state by default), points to its folder; all else
that is known of it stands there. A folder that was deleted takes its job with it.
"""

from __future__ import annotations

import os
from pathlib import Path

from dtrain.launchers.job import Facts, Job

__all__ = ["add", "find", "jobs", "open_job"]


def folder() -> Path:
    """Where the pointers lie."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dtrain" / "jobs"


def add(facts: Facts) -> None:
    """Remember a job."""
    folder().mkdir(parents=True, exist_ok=True)
    (folder() / f"{facts.launcher}-{facts.cluster or 'here'}-{facts.id}").write_text(facts.folder + "\n")


def jobs() -> list[Job]:
    """All jobs whose folders are still there and hold this job, newest first."""
    found = []
    for pointer in folder().glob("*") if folder().is_dir() else ():
        try:
            facts = Facts.read(Path(pointer.read_text().strip()))
        except (OSError, ValueError, TypeError):
            continue
        if pointer.name.endswith(f"-{facts.id}"):  # the folder may have gone on as another job since
            found.append(open_job(facts))
    return sorted(found, key=lambda job: -job.facts.submitted)


def find(name: str) -> Job:
    """The newest job with this id, or of this folder. Raises ``LookupError`` naming the jobs that there are."""
    path = Path(name)
    if (path / "job.json").is_file():
        return open_job(Facts.read(path.absolute()))
    known = jobs()
    for job in known:
        if name in (job.id, job.facts.name):
            return job
    ids = ", ".join(job.id for job in known[:10]) or "none was submitted from this machine"
    raise LookupError(f"there is no job {name} (there are {ids}); give an id, or the folder of a job")


def open_job(facts: Facts) -> Job:
    """The job of these facts, whatever launched it."""
    if facts.launcher == "slurm":
        from dtrain.launchers.slurm.job import SlurmJob

        return SlurmJob(facts)
    from dtrain.launchers.background import BackgroundJob

    return BackgroundJob(facts)
