"""Jobs without a scheduler: a process of their own on this machine, which outlives the command that submitted them.

``python -m dtrain.launchers.background FOLDER`` is that process. It starts the ranks as FOLDER/background.json says,
under torch's elastic agent or under mpirun, and writes FOLDER/end.json when they have ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.launchers import mpi, registry
from dtrain.launchers.job import ENDED, Facts, Job, Program, State, command_of
from dtrain.launchers.local import launch
from dtrain.launchers.probe import FOLDER, HANG_SECONDS
from dtrain.launchers.record import ATTEMPT, RankRecord, keep_attempt, rank_files
from dtrain.launchers.words import sent

__all__ = ["BackgroundJob", "LocalLauncher", "MpiLauncher", "rank_command"]

CLUSTER = "DTRAIN_CLUSTER"


@dataclass(frozen=True, kw_only=True)
class LocalLauncher:
    """Starts ``workers`` ranks on this machine, under torch's elastic agent; see `dtrain.launchers.local`."""

    workers: int = 1
    max_restarts: int = 0
    grace_seconds: float = 60.0
    threads_per_worker: int = 1
    hang_seconds: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict)

    name = "local"

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job") -> str:
        """The command of each rank."""
        command = rank_command(command_of(program, folder), folder)
        return f"# {self.workers} ranks on this machine, each:\n{shlex.join(command)}\n"

    def submit(self, program: Program, *, folder: Path, name: str = "job") -> Job:
        """Start the job; see `dtrain.launchers.job.Launcher`."""
        if self.workers < 1:
            raise ValueError(f"launcher.workers={self.workers}: a job has at least 1 worker")
        settings = {**dataclasses.asdict(self), "environment": dict(self.environment)}
        return start(self.name, settings, program, folder=folder.absolute(), name=name)


@dataclass(frozen=True, kw_only=True)
class MpiLauncher:
    """Starts ``workers`` ranks under mpirun: on ``hosts``, on the nodes of a Slurm allocation, or on this machine."""

    workers: int = 1
    mpirun: str = ""
    hosts: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    address: str = ""
    port: int = 0
    max_restarts: int = 0
    grace_seconds: float = 60.0
    threads_per_worker: int = 1
    hang_seconds: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict)

    name = "mpi"

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job") -> str:
        """The mpirun line."""
        settings = dataclasses.asdict(self)
        found, nodes = _found(self.mpirun), mpi.nodes_of_slurm()
        ranks = mpi.complete(found, _ranks(settings), nodes=nodes)
        command = rank_command(command_of(program, folder), folder)
        return shlex.join(mpi.line(found, command, ranks, nodes=nodes, root=os.geteuid() == 0)) + "\n"

    def submit(self, program: Program, *, folder: Path, name: str = "job") -> Job:
        """Start the job; see `dtrain.launchers.job.Launcher`."""
        _found(self.mpirun)
        settings = {**dataclasses.asdict(self), "environment": dict(self.environment)}
        return start(self.name, settings, program, folder=folder.absolute(), name=name)


def _found(name: str) -> mpi.Mpirun:
    try:
        return mpi.find_mpirun(name or "mpirun")
    except mpi.NoMpirun as error:
        raise ValueError(str(error)) from error


def _ranks(settings: Mapping[str, Any]) -> mpi.Ranks:
    environment = {"OMP_NUM_THREADS": str(settings["threads_per_worker"]), **settings["environment"]}
    if CLUSTER in os.environ:
        # Its hosts are one machine: the shared memory that MPICH finds there would bypass the links.
        environment.setdefault("UCX_TLS", "tcp,self")
    environment |= {name: os.environ[name] for name in (FOLDER, HANG_SECONDS, ATTEMPT) if name in os.environ}
    return mpi.Ranks(
        workers=settings["workers"], hosts=tuple(settings["hosts"]), environment=environment,
        extra=tuple(settings["arguments"]), address=settings["address"], port=settings["port"],
    )  # fmt: skip


def rank_command(program: Sequence[str], folder: Path) -> list[str]:
    """The command line of one rank: the program under the process that records how it ended."""
    return [sys.executable, "-P", "-m", "dtrain.launchers.rank", str(folder), "--", *sent(program)]


def start(launcher: str, settings: Mapping[str, object], program: Program, *, folder: Path, name: str) -> Job:
    """Start the background process of a job and return when it has a process id."""
    folder.mkdir(parents=True, exist_ok=True)
    running = BackgroundJob.of(folder)
    if running is not None and running.state() not in ENDED:
        raise ValueError(f"{folder} holds job {running.id}, which still runs; cancel it, or choose another folder")
    for stale in ("end.json", "job.json"):
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(rank_files(folder), ignore_errors=True)  # another job's
    command = command_of(program, folder)
    (folder / "background.json").write_text(json.dumps({"settings": settings, "program": command}) + "\n")
    (folder / "logs").mkdir(exist_ok=True)
    argv = [sys.executable, "-P", "-m", "dtrain.launchers.background", launcher, str(folder)]
    with (folder / "logs" / "batch.log").open("ab") as log:
        # The shell leaves at once, so that the job is nobody's child and outlives this process without a trace in it.
        started = subprocess.run(
            ["sh", "-c", 'setsid "$@" <&- >&2 & echo $!', "sh", *argv], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=log, text=True, check=True,
        )  # fmt: skip
    facts = Facts(
        id=started.stdout.strip(), launcher=launcher, name=name, folder=str(folder), program=command,
        workers=int(str(settings["workers"])), submitted=time.time(),
    )  # fmt: skip
    facts.write()
    registry.add(facts)
    return BackgroundJob(facts)


class BackgroundJob(Job):
    """A job of this machine; its id is the number of its background process."""

    @classmethod
    def of(cls, folder: Path) -> BackgroundJob | None:
        """The job of a folder, if one was started there without a scheduler."""
        try:
            facts = Facts.read(folder)
        except (OSError, ValueError, TypeError):
            return None
        return cls(facts) if facts.launcher != "slurm" else None

    def ask(self) -> State:
        """Whether its process lives. A number that was given away again is told by the command line."""
        try:
            words = Path(f"/proc/{self.id}/cmdline").read_bytes().split(b"\0")
            stat = Path(f"/proc/{self.id}/stat").read_text()
        except OSError:
            return "lost"
        ours = str(self.folder).encode() in words or not any(words)  # empty while it becomes python
        return "running" if ours and stat.rpartition(")")[2].split()[0] not in "ZX" else "lost"

    def cancel(self) -> None:
        """SIGTERM: the ranks get the time to checkpoint that the launcher was told to give them."""
        if self.ask() == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.id), signal.SIGTERM)


def main(launcher: str, folder: Path) -> None:
    """Run the job to its end."""
    stored = json.loads((folder / "background.json").read_text())
    command, settings = rank_command(stored["program"], folder), stored["settings"]
    os.environ.update(settings["environment"])
    os.environ[FOLDER], os.environ[HANG_SECONDS] = str(rank_files(folder)), f"{settings['hang_seconds']:g}"
    run = _run_mpi if launcher == "mpi" else _run_local
    stopped = run(command, settings, folder)
    code = RankRecord.verdict(folder, settings["workers"])
    reason = "cancelled" if stopped else ENDINGS.get(code, "failed")
    content = {"code": code, "reason": reason, "job": str(os.getpid()), "time": int(time.time())}
    new = folder / "end.json.new"
    new.write_text(json.dumps(content) + "\n")
    os.replace(new, folder / "end.json")


ENDINGS = {
    0: "finished", 2: "the configuration cannot run", 75: "checkpointed, to be run again", 130: "ended by the user",
}  # fmt: skip


def _run_local(command: list[str], settings: Mapping[str, Any], folder: Path) -> bool:
    """Run the ranks; whether they were asked to stop."""
    ending = launch(
        command, workers=settings["workers"], log_folder=folder / "logs" / "agent",
        max_restarts=settings["max_restarts"], grace_seconds=settings["grace_seconds"],
        threads_per_worker=settings["threads_per_worker"],
    )  # fmt: skip
    return ending.kind == "signalled"


def _run_mpi(command: list[str], settings: Mapping[str, Any], folder: Path) -> bool:
    """Run the ranks, again after a failure; whether they were asked to stop."""
    found = _found(settings["mpirun"])
    for attempt in range(settings["max_restarts"] + 1):
        os.environ[ATTEMPT] = str(attempt)
        keep_attempt(folder)
        print(f"{time.strftime('%F %T')} dtrain: attempt {attempt + 1}", flush=True)  # into batch.log
        ended = mpi.run(
            found, command, _ranks(settings), log=folder / "logs" / "batch.log",
            grace_seconds=settings["grace_seconds"],
        )  # fmt: skip
        if ended.signal or RankRecord.verdict(folder, settings["workers"]) != 1:
            return bool(ended.signal)
    return False


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
