"""A launcher for PBS, as somebody would add it: one file. qsub is a fake; that it fits is what counts."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dtrain.launchers import job_list, rank
from dtrain.launchers.inherited_environment import Kept
from dtrain.launchers.job import Facts, Job, Program, State, command_of
from dtrain.launchers.launcher import Keys, at_least_one


class PbsJob(Job):
    """A job of PBS; the fake knows only those that it has."""

    scheduled: ClassVar[bool] = True
    cancelled: ClassVar[set[str]] = set()

    def ask(self) -> State:
        """As qstat would say."""
        return "cancelled" if self.id in self.cancelled else "pending"

    def cancel(self) -> None:
        """As qdel would."""
        self.cancelled.add(self.id)

    def waits_for(self) -> str:
        """The queue."""
        return "Queue"


@dataclass(frozen=True, kw_only=True)
class PbsLauncher(Keys):
    """Submits jobs by qsub."""

    name: str = "pbs"
    queue: str = ""
    """The queue; empty: the site's."""
    walltime_minutes: int = at_least_one(30)

    job_class: ClassVar[type[Job]] = PbsJob
    keeps: ClassVar[Kept] = "cluster"

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job", replicas: int = 1) -> str:
        """The script for qsub."""
        command = rank.command(command_of(program, folder, python=self.python), folder, self.python)
        exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.variables().items())
        queue = f"#PBS -q {self.queue}\n" if self.queue else ""
        return (
            f"#!/bin/bash\n#PBS -N {name}\n{queue}#PBS -l select={self.nodes}:mpiprocs={self.workers // self.nodes}\n"
            f"#PBS -l walltime={self.walltime_minutes}:00\n{exports}mpiexec {shlex.join(command)}\n"
        )

    def start(self, program: Program, *, folder: Path, name: str = "job", replicas: int = 1) -> Job:
        """As qsub would."""
        command = command_of(program, folder, python=self.python)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.pbs").write_text(self.render(command, folder=folder, name=name))
        facts = Facts("4711", self.name, name, str(folder), command, self.workers, time.time())
        facts.write()
        job_list.add(facts)
        return PbsJob(facts)
