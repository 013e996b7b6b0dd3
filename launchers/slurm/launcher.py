"""Submission to Slurm, through submitit: its executor, with our sbatch text and without its wrapper around the ranks.

submitit's own wrapper requeues from a signal handler on rank 0; here the script does, after all ranks have ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.launchers import job_list as registry
from dtrain.launchers import trust as trusted
from dtrain.launchers.code_copy import Snapshot
from dtrain.launchers.environment import CLUSTER
from dtrain.launchers.inherited_environment import DEFAULTS, defaults_of_shell, handed_on, replaced
from dtrain.launchers.job import Facts, Program, command_of
from dtrain.launchers.slurm.client import SlurmError, ask
from dtrain.launchers.slurm.job import SlurmJob
from dtrain.launchers.slurm.preflight import problems
from dtrain.launchers.slurm.refusal import told, unanswered
from dtrain.launchers.slurm.script import Work, render
from dtrain.launchers.slurm.settings import SlurmSettings, unwritable

__all__ = ["SlurmLauncher"]


class SlurmLauncher:
    """Submits jobs that ask for ``settings``. ``environment`` is set for every rank, beside what Slurm hands on.

    ``snapshot``: the job runs a copy of the code around the working directory, which lies in its folder.
    """

    name = "slurm"

    def __init__(
        self, settings: SlurmSettings, environment: Mapping[str, str] | None = None, *, snapshot: bool = True
    ) -> None:
        given = [key for key in DEFAULTS.values() if getattr(settings, key)]
        directives = [text.lstrip("-").partition("=")[0] for text in settings.sbatch]
        defaults, more = defaults_of_shell(os.environ, [*given, *directives])
        chosen: dict[str, Any] = {**defaults, "sbatch": (*settings.sbatch, *more)}
        # The interpreter of this very command, by its path: nodes see the same file system.
        self.settings = dataclasses.replace(settings, python=settings.python or sys.executable, **chosen)
        self._environment = dict(environment or {})
        self._snapshot = snapshot

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job") -> str:
        """The sbatch text of one job."""
        return render(self._work(self._command(program, folder), [folder], name, literal=True), self.settings)

    def render_array(self, program: Sequence[str], *, folders: Sequence[Path], name: str = "sweep") -> str:
        """The sbatch text of an array: an element for each folder, which "{folder}" in ``program`` stands for."""
        return render(self._work(self._command(program, folders[0]), folders, name), self.settings)

    def submit(self, program: Program, *, folder: Path, name: str = "job") -> SlurmJob:
        """Submit one job; see `dtrain.launchers.job.Launcher`."""
        self.check([folder])
        return self._submit(self._command(program, folder), [folder.absolute()], name, literal=True)[0]

    def submit_array(self, program: Sequence[str], *, folders: Sequence[Path], name: str = "sweep") -> list[SlurmJob]:
        """Submit a job array, at most ``array_parallel`` elements of which run at the same time."""
        self.check(folders)
        return self._submit(self._command(program, folders[0]), [folder.absolute() for folder in folders], name)

    def check(self, folders: Sequence[Path]) -> None:
        """Raise ``ValueError`` for all that Slurm would refuse, or accept and never start."""
        _check_names("", folders)
        found = problems(self.settings, folders[0], one_machine=CLUSTER in os.environ)
        if found:
            raise ValueError("\n".join(found))

    def _command(self, program: Program, folder: Path) -> tuple[str, ...]:
        return command_of(program, folder.absolute(), python=self.settings.python)

    def _work(self, program: tuple[str, ...], folders: Sequence[Path], name: str, *, literal: bool = False) -> Work:
        absolute = tuple(folder.absolute() for folder in folders)
        _check_names(name, absolute)
        lists = absolute[0].parent / f"{name}-array" / "folders.txt"
        environment = dict(self._environment)
        if self._snapshot:
            snapshot = self._taken_from(absolute, lists)
            program, environment = snapshot.mapped(program), {**snapshot.variables, **environment}
        return Work(name, program, absolute, Path.cwd(), lists, environment, literal)

    def _taken_from(self, folders: Sequence[Path], lists: Path) -> Snapshot:
        return Snapshot.of(Path.cwd(), (lists.parent if len(folders) > 1 else folders[0]) / "code")

    def _submit(
        self, program: tuple[str, ...], folders: list[Path], name: str, *, literal: bool = False
    ) -> list[SlurmJob]:
        work = self._work(program, folders, name, literal=literal)
        for folder in folders:
            trusted.make_folder(folder)
        if self._snapshot:
            self._taken_from(work.folders, work.lists).take()
        for folder in folders:
            # Slurm opens the log before the script could make its folder, and says nothing if it cannot.
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            for stale in ("end.json", "attempts", "fruitless"):
                (folder / stale).unlink(missing_ok=True)
            shutil.rmtree(folder / "ranks", ignore_errors=True)
        if work.array:
            work.lists.parent.mkdir(parents=True, exist_ok=True)
            work.lists.write_text("".join(f"{folder}\n" for folder in folders))
        text = render(work, self.settings)
        for folder in folders:
            trusted.write_private(folder / "job.sbatch", text.encode())  # its environment is nobody else's business
        number = _sbatch(text, work.lists.parent if work.array else folders[0] / "logs" / "sbatch", self.settings)
        jobs = []
        for index, folder in enumerate(folders):
            facts = Facts(
                id=f"{number}_{index}" if work.array else number, launcher=self.name, name=name, folder=str(folder),
                program=program, workers=self.settings.workers, submitted=time.time(),
                cluster=os.environ.get(CLUSTER, ""),
            )  # fmt: skip
            facts.write()
            registry.add(facts)
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
        with contextlib.redirect_stderr(io.StringIO()), replaced(handed_on(os.environ, "slurm")):
            job = executor._submit_command("")
    except (FailedJobError, FailedSubmissionError) as error:
        if unanswered(str(error)):
            raise SlurmError(f"sbatch could not submit the job: {error}") from error
        raise ValueError(told(str(error), settings)) from error
    return str(job.job_id)
