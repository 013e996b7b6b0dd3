"""``launcher=slurm``: its keys, their checks, and submission, through submitit.

submitit's executor gets our sbatch text, without submitit's wrapper around the ranks: that one requeues from a signal
handler on rank 0; here the script does (`dtrain.launchers.slurm.attempt`), after all ranks have ended.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dtrain.launchers import job_list
from dtrain.launchers import trust as trusted
from dtrain.launchers.code_copy import Snapshot
from dtrain.launchers.environment import CLUSTER
from dtrain.launchers.inherited_environment import DEFAULTS, Kept, defaults_of_shell, handed_on, replaced, unused
from dtrain.launchers.job import Facts, Job, Program, command_of
from dtrain.launchers.launcher import Allocation, Keys, not_negative, one_of, out_of_range
from dtrain.launchers.slurm.client import SlurmError, ask
from dtrain.launchers.slurm.group import Group
from dtrain.launchers.slurm.job import SlurmJob
from dtrain.launchers.slurm.refusal import problems, refusal_message, unanswered
from dtrain.launchers.slurm.script import Work, render

__all__ = ["SlurmLauncher"]

MOST_MINUTES = (2**31 - 1) // 60  # Slurm keeps a time limit in 32 bits of seconds, which more would overflow


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher(Allocation, Keys):
    """Submits jobs. With ``snapshot`` each runs a copy of the code around the working directory, in its folder."""

    name: str = "slurm"
    max_restarts: int = not_negative(3)
    array_parallel: int = not_negative(0)
    """How many runs of a sweep may run at the same time; 0: all."""
    per_node: str = one_of("srun", "torchrun")
    """``srun``: one task per rank. ``torchrun``: one task per node, whose torchrun starts its ranks."""
    isolate: str = one_of("none", "replica")
    """``replica``: a job step per replica, so that a dead one does not take the others with it."""
    signal_seconds: int = not_negative(120)
    """How long before the time limit the ranks get a signal; 0: none."""
    address: str = ""
    """Where the ranks meet; empty: the job's first node."""
    port: int = not_negative(0)
    """0: a free one."""
    setup: tuple[str, ...] = ()
    """Lines of the batch script before the ranks start: ``module load ...``."""
    container: str = ""
    """An image; empty: none."""
    container_runtime: str = one_of("pyxis", "apptainer")
    container_args: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    """Any further directive: ``mail-type=END``, ``exclusive``."""
    groups: tuple[str, ...] = ()
    """The components of a heterogeneous job: ``nodes=2 workers=4 constraint=a100``; their sums are its size."""

    job_class: ClassVar[type[Job]] = SlurmJob
    keeps: ClassVar[Kept] = "cluster"
    arrays: ClassVar[bool] = True

    @property
    def components(self) -> tuple[Group, ...]:
        """``groups``, parsed. Raises ``ValueError`` for an invalid one, which `problems` names."""
        return tuple(Group.parse(text) for text in self.groups)

    @property
    def all_nodes(self) -> int:
        """Nodes of the job."""
        return sum(group.nodes for group in self.components) or self.nodes

    @property
    def all_workers(self) -> int:
        """Ranks of the job."""
        return sum(group.workers for group in self.components) or self.workers

    @property
    def same_files(self) -> bool:
        """Not in a container, or after lines that may load programs."""
        return not (self.container or self.setup)

    @property
    def same_replicas(self) -> bool:
        """The elements of an array have the same job steps."""
        return self.isolate == "replica"

    @property
    def login_host(self) -> bool:
        """Slurm's commands work there."""
        return True

    def problems(self, replicas: int = 1) -> list[str]:
        """Settings that are invalid wherever it is submitted; each with the value and the way out."""
        if problems := out_of_range(self):
            return problems
        try:
            nodes, workers = self.all_nodes, self.all_workers
        except ValueError as error:
            return [f"launcher.groups: {error}"]
        return [
            *self._malformed(),
            *([] if self.groups else self._uneven()),
            *self._times(),
            *self._steps(replicas if self.same_replicas else 1, nodes, workers),
            *self._container(),
            *self._unwritable(),
        ]

    def warnings(self) -> list[str]:
        """The defaults of sbatch that the shell sets, and that no key covers."""
        return unused(os.environ)

    def check(self, folders: Sequence[Path]) -> None:
        """Raise ``ValueError`` for all that Slurm would refuse, or accept and never start."""
        _check_names("", folders)
        objections = problems(self.asked(), folders[0], one_machine=CLUSTER in os.environ)
        if objections:
            raise ValueError("\n".join(objections))

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

    def asked(self) -> SlurmLauncher:
        """The request to Slurm: this, and what sbatch would take from the shell for keys that are not set."""
        given = [key for key in DEFAULTS.values() if getattr(self, key)]
        directives = [text.lstrip("-").partition("=")[0] for text in self.sbatch]
        defaults, more = defaults_of_shell(os.environ, [*given, *directives])
        # The interpreter of this very command, by its path: nodes see the same file system.
        return self.replaced(python=self.python or sys.executable, sbatch=(*self.sbatch, *more), **defaults)

    def _times(self) -> Iterator[str]:
        if self.minutes > MOST_MINUTES:
            yield (
                f"launcher.minutes={self.minutes} is more than Slurm can count, which is {MOST_MINUTES}; the job goes "
                "on after each limit, so 1440, a day, serves as well"
            )
        if self.signal_seconds and self.signal_seconds >= 60 * self.minutes:
            yield (
                f"launcher.signal_seconds={self.signal_seconds} leaves nothing of a time limit of {self.minutes} "
                "minutes; make launcher.minutes longer or launcher.signal_seconds shorter"
            )

    def _steps(self, steps: int, nodes: int, workers: int) -> Iterator[str]:
        if steps > 1 and workers % steps:
            yield f"{workers} workers cannot form {steps} job steps of equal size"
        if steps > 1 and (self.per_node == "torchrun" or self.groups):
            yield "launcher.isolate=replica needs launcher.per_node=srun and no launcher.groups"
        elif steps > 1 and nodes % steps and steps % nodes:
            yield (
                f"launcher.isolate=replica: {steps} replicas on launcher.nodes={nodes} would share nodes "
                f"unevenly; take {steps} nodes, or a multiple or a divisor of that"
            )
        elif steps > nodes and self.gpus_per_node:
            # A step counts its tasks on a node from 0, and so would two ranks take the same GPU.
            yield (
                f"launcher.isolate=replica: {steps // nodes} replicas on each node would take the same "
                f"GPUs; take launcher.nodes={steps} or a multiple, or launcher.isolate=none"
            )

    def _container(self) -> Iterator[str]:
        if not self.container and (self.container_args or self.container_runtime != "pyxis"):
            yield (
                "launcher.container_args and launcher.container_runtime are for a launcher.container, and there is none"
            )

    def _unwritable(self) -> Iterator[str]:
        if self.port > 65535:
            yield f"launcher.port={self.port} is no port; choose 1024 to 65535, or 0 for a free one"
        texts = {name: str(getattr(self, name)) for name in _DIRECTIVES}
        for key, text in [*texts.items(), *(("sbatch", text) for text in self.sbatch)]:
            if unwritable(text):
                yield f"launcher.{key}={text!r} holds {unwritable(text)}, and is a line of the batch script"
        for directive in self.sbatch:
            key = directive.lstrip("-").partition("=")[0]
            if key in _OURS:
                yield f"launcher.sbatch: {directive} is written by dtrain; set {_OURS[key]} instead"


def _work(
    asked: SlurmLauncher, program: Program, folders: Sequence[Path], name: str, replicas: int, *, literal: bool = False
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


def _submit(work: Work, asked: SlurmLauncher) -> list[SlurmJob]:
    for folder in work.folders:
        trusted.make_folder(folder)
    if work.code is not None:
        work.code.take()
    for folder in work.folders:
        # Slurm opens the log before the script could make its folder, and reports no error if it cannot.
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        for stale in ("end.json", "attempts", "fruitless"):
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / "ranks", ignore_errors=True)
    if work.array:
        work.lists.parent.mkdir(parents=True, exist_ok=True)
        work.lists.write_text("".join(f"{folder}\n" for folder in work.folders))
    text = render(work, asked)
    for folder in work.folders:
        trusted.write_private(folder / "job.sbatch", text.encode())  # its environment may hold secrets
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
    """Raise ``ValueError`` for names that a directive cannot hold: sbatch's own error would be misleading."""
    if unwritable(name):
        raise ValueError(f"the job's name {name!r} holds {unwritable(name)}: choose another --name or run.dir")
    for folder in map(str, folders):
        if unwritable(folder) or "\\" in folder:
            what = unwritable(folder) or "a backslash, below which Slurm writes no log"
            raise ValueError(f"run.dir={folder!r} holds {what}: choose another run.dir")


def _sbatch(text: str, folder: Path, settings: SlurmLauncher) -> str:
    """Submit through submitit; returns the job's number.

    Raises ``ValueError`` with sbatch's objections to the job, ``SlurmError`` where it could not judge it.
    """
    ask("sbatch", "--version")  # submitit's own error for a missing Slurm has no way out
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
        raise ValueError(refusal_message(str(error), settings)) from error
    return str(job.job_id)


def unwritable(text: str) -> str:
    """The control character, in words, of a text that is to fit in one line of a batch script; empty if it has none."""
    forbidden = next((sign for sign in text if ord(sign) < 32 or ord(sign) == 127), "")
    return {"": "", "\n": "a line break"}.get(forbidden, f"the control character {forbidden!r}")


_DIRECTIVES = ("partition", "account", "qos", "constraint", "exclude", "reservation", "address", "interface")

_OURS = {
    "nodes": "launcher.nodes", "ntasks": "launcher.workers", "ntasks-per-node": "launcher.workers",
    "time": "launcher.minutes", "partition": "launcher.partition", "account": "launcher.account",
    "qos": "launcher.qos", "array": "a sweep (dtrain train -m)", "output": "run.dir", "error": "run.dir",
    "open-mode": "nothing (it must be append)", "requeue": "nothing (it is always on)",
    "cpus-per-task": "launcher.threads_per_worker", "signal": "launcher.signal_seconds",
}  # fmt: skip
