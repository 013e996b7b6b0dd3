"""Submission to Slurm, through submitit: its executor, with our sbatch text and without its wrapper around the ranks.

submitit's own wrapper requeues from a signal handler on rank 0; here the script does, after all ranks have ended.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dtrain.launchers import job_list
from dtrain.launchers import trust as trusted
from dtrain.launchers.code_copy import Snapshot
from dtrain.launchers.environment import CLUSTER
from dtrain.launchers.inherited_environment import DEFAULTS, Kept, defaults_of_shell, handed_on, replaced, unused
from dtrain.launchers.job import Facts, Job, Program, command_of
from dtrain.launchers.slurm.client import SlurmError, ask
from dtrain.launchers.slurm.job import SlurmJob
from dtrain.launchers.slurm.preflight import problems
from dtrain.launchers.slurm.refusal import told, unanswered
from dtrain.launchers.slurm.script import Work, render
from dtrain.launchers.slurm.settings import SlurmSettings, unwritable

__all__ = ["SlurmLauncher"]


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher(SlurmSettings):
    """Submits jobs; with ``snapshot`` each runs a copy of the code around the working directory, in its folder."""

    job_class: ClassVar[type[Job]] = SlurmJob
    keeps: ClassVar[Kept] = "cluster"
    arrays: ClassVar[bool] = True

    @property
    def login_host(self) -> bool:
        """Slurm's commands work there."""
        return True

    def warnings(self) -> list[str]:
        """The defaults of sbatch that the shell sets, and no key stands for."""
        return unused(os.environ)

    def check(self, folders: Sequence[Path]) -> None:
        """Raise ``ValueError`` for all that Slurm would refuse, or accept and never start."""
        _check_names("", folders)
        found = problems(self.asked(), folders[0], one_machine=CLUSTER in os.environ)
        if found:
            raise ValueError("\n".join(found))

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job", replicas: int = 1) -> str:
        """The sbatch text of one job."""
        asked = self.asked()
        return render(_work(asked, program, [folder], name, replicas, literal=True), asked)

    def render_array(
        self, program: Sequence[str], *, folders: Sequence[Path], name: str = "sweep", replicas: int = 1
    ) -> str:
        """The sbatch text of an array: an element for each folder, which "{folder}" in ``program`` stands for."""
        asked = self.asked()
        return render(_work(asked, program, folders, name, replicas), asked)

    def start(self, program: Program, *, folder: Path, name: str = "job", replicas: int = 1) -> SlurmJob:
        """Submit one job; see `dtrain.launchers.launcher.Launcher`."""
        asked = self.asked()
        return _submit(_work(asked, program, [folder], name, replicas, literal=True), asked)[0]

    def start_array(
        self, program: Sequence[str], *, folders: Sequence[Path], name: str = "sweep", replicas: int = 1
    ) -> list[SlurmJob]:
        """Submit a job array, at most ``array_parallel`` elements of which run at the same time."""
        asked = self.asked()
        return _submit(_work(asked, program, folders, name, replicas), asked)

    def submit_array(self, program: Sequence[str], *, folders: Sequence[Path], name: str = "sweep") -> list[SlurmJob]:
        """As `submit`."""
        if problems := self.problems():
            raise ValueError("\n".join(problems))
        self.check(folders)
        return self.start_array(program, folders=folders, name=name)

    def asked(self) -> SlurmSettings:
        """What Slurm is asked for: this, and what sbatch would take from the shell for keys that are not set."""
        given = [key for key in DEFAULTS.values() if getattr(self, key)]
        directives = [text.lstrip("-").partition("=")[0] for text in self.sbatch]
        defaults, more = defaults_of_shell(os.environ, [*given, *directives])
        # The interpreter of this very command, by its path: nodes see the same file system.
        return self.replaced(python=self.python or sys.executable, sbatch=(*self.sbatch, *more), **defaults)


def _work(
    asked: SlurmSettings, program: Program, folders: Sequence[Path], name: str, replicas: int, *, literal: bool = False
) -> Work:
    absolute = tuple(folder.absolute() for folder in folders)
    _check_names(name, absolute)
    plain = command = command_of(program, absolute[0], python=asked.python)
    lists = absolute[0].parent / f"{name}-array" / "folders.txt"
    environment, code = asked.variables(), None
    if asked.snapshot:
        code = Snapshot.of(Path.cwd(), (lists.parent if len(absolute) > 1 else absolute[0]) / "code")
        command, environment = code.mapped(command), {**code.variables, **environment}
    return Work(name, command, absolute, Path.cwd(), lists, environment, literal, replicas, code, plain, sys.executable)


def _submit(work: Work, asked: SlurmSettings) -> list[SlurmJob]:
    for folder in work.folders:
        trusted.make_folder(folder)
    if work.code is not None:
        work.code.take()
    for folder in work.folders:
        # Slurm opens the log before the script could make its folder, and says nothing if it cannot.
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        for stale in ("end.json", "attempts", "fruitless"):
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / "ranks", ignore_errors=True)
    if work.array:
        work.lists.parent.mkdir(parents=True, exist_ok=True)
        work.lists.write_text("".join(f"{folder}\n" for folder in work.folders))
    text = render(work, asked)
    for folder in work.folders:
        trusted.write_private(folder / "job.sbatch", text.encode())  # its environment is nobody else's business
    number = _sbatch(text, work.lists.parent if work.array else work.folders[0] / "logs" / "sbatch", asked)
    jobs = []
    for index, folder in enumerate(work.folders):
        facts = Facts(
            id=f"{number}_{index}" if work.array else number, launcher=asked.name, name=work.name, folder=str(folder),
            program=work.given, workers=asked.all_workers, submitted=time.time(), cluster=os.environ.get(CLUSTER, ""),
        )  # fmt: skip
        facts.write()
        job_list.add(facts)
        jobs.append(SlurmJob(facts))
    return jobs


def _check_names(name: str, folders: Sequence[Path]) -> None:
    """Raise ``ValueError`` for names that a directive cannot hold: sbatch would speak of something else."""
    if unwritable(name):
        raise ValueError(f"the job's name {name!r} holds {unwritable(name)}: choose another --name or run.dir")
    for folder in map(str, folders):
        if unwritable(folder) or "\\" in folder:
            what = unwritable(folder) or "a backslash, below which Slurm writes no log"
            raise ValueError(f"run.dir={folder!r} holds {what}: choose another run.dir")


def _sbatch(text: str, folder: Path, settings: SlurmSettings) -> str:
    """Submit through submitit; returns the job's number.

    Raises ``ValueError`` with what sbatch said against the job, ``SlurmError`` where it could not say.
    """
    ask("sbatch", "--version")  # submitit's own words for a missing Slurm do not say what to do
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]  # it has no types here
        """Submits ``text`` as it is."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return text

    folder.mkdir(parents=True, exist_ok=True)
    executor: Any = Executor(folder=folder)
    try:
        # submitit prints what it raises, too
        with contextlib.redirect_stderr(io.StringIO()), replaced(handed_on(os.environ, "cluster")):
            job = executor._submit_command("")
    except (FailedJobError, FailedSubmissionError) as error:
        if unanswered(str(error)):
            raise SlurmError(f"sbatch could not submit the job: {error}") from error
        raise ValueError(told(str(error), settings)) from error
    return str(job.job_id)
