"""Jobs without a scheduler: a process of their own on this machine, which outlives the command that submitted them.

``python -m dtrain.launchers.background FOLDER`` is that process. It starts the ranks as FOLDER/background.json says,
under torch's elastic agent or under mpirun, and writes FOLDER/end.json when they have ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
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

from dtrain.launchers import job_list as registry
from dtrain.launchers import mpi
from dtrain.launchers import trust as trusted
from dtrain.launchers.argv import sent
from dtrain.launchers.environment import CLUSTER
from dtrain.launchers.exit_codes import ENDINGS, FAILED
from dtrain.launchers.inherited_environment import handed_on
from dtrain.launchers.job import ENDED, Facts, Job, Program, State, command_of
from dtrain.launchers.local import launch
from dtrain.launchers.probe import FOLDER, HANG_SECONDS
from dtrain.launchers.records import ATTEMPT, RankRecord, keep_attempt, rank_files
from dtrain.launchers.strict_json import Damaged, json_of, shaped

__all__ = ["BackgroundJob", "LocalLauncher", "MpiLauncher", "rank_command"]


@dataclass(frozen=True, kw_only=True)
class LocalLauncher:
    """Starts ``workers`` ranks on this machine, under torch's elastic agent; see `dtrain.launchers.local`."""

    workers: int = 1
    max_restarts: int = 0
    grace_seconds: float = 60.0
    threads_per_worker: int = 1
    hang_seconds: float = 600.0
    python: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    name = "local"

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job") -> str:
        """The command of each rank."""
        command = rank_command(command_of(program, folder, python=self.python), folder, self.python)
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
    python: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    name = "mpi"

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job") -> str:
        """The mpirun line."""
        settings = dataclasses.asdict(self)
        found, nodes = _found(self.mpirun), mpi.nodes_of_slurm()
        ranks = mpi.complete(found, _ranks(settings), nodes=nodes)
        command = rank_command(command_of(program, folder, python=self.python), folder, self.python)
        here = mpi.names_of_this_host()
        return shlex.join(mpi.line(found, command, ranks, nodes=nodes, root=os.geteuid() == 0, here=here)) + "\n"

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
    environment |= {ATTEMPT: os.environ[ATTEMPT]} if ATTEMPT in os.environ else {}
    return mpi.Ranks(
        workers=settings["workers"], hosts=tuple(settings["hosts"]), environment=environment,
        extra=tuple(settings["arguments"]), address=settings["address"], port=settings["port"],
    )  # fmt: skip


def rank_command(program: Sequence[str], folder: Path, python: str = "") -> list[str]:
    """The command line of one rank: the program under the process that records how it ended, by ``python``."""
    return [python or sys.executable, "-P", "-m", "dtrain.launchers.rank", str(folder), "--", *sent(program)]


def start(launcher: str, settings: Mapping[str, object], program: Program, *, folder: Path, name: str) -> Job:
    """Start the background process of a job and return when it has a process id."""
    trusted.make_folder(folder)
    running = BackgroundJob.of(folder)
    if running is not None and running.state() not in ENDED:
        raise ValueError(f"{folder} holds job {running.id}, which still runs; cancel it, or choose another folder")
    for stale in ("end.json", "job.json"):
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(rank_files(folder), ignore_errors=True)  # another job's
    command = command_of(program, folder, python=str(settings["python"]))
    # Its environment may hold what is nobody else's business.
    content = json.dumps({"settings": settings, "program": command}) + "\n"
    trusted.write_private(folder / "background.json", content.encode())
    (folder / "logs").mkdir(exist_ok=True)
    argv = [sys.executable, "-P", "-m", "dtrain.launchers.background", launcher, str(folder)]
    with (folder / "logs" / "batch.log").open("ab") as log:
        # The shell leaves at once, so that the job is nobody's child and outlives this process without a trace in it.
        started = subprocess.run(
            ["sh", "-c", 'setsid "$@" <&- >&2 & echo $!', "sh", *argv], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=log, text=True, check=True,
            env=handed_on(os.environ, "mpi" if launcher == "mpi" else "local"),
        )  # fmt: skip
    facts = Facts(
        id=started.stdout.strip(), launcher=launcher, name=name, folder=str(folder), program=command,
        workers=int(str(settings["workers"])), submitted=time.time(), started=began(started.stdout.strip()) or "",
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
        """Whether its process lives; a number that was given away again is another process."""
        return "running" if self._is_ours() else "lost"

    def cancel(self) -> None:
        """SIGTERM: the ranks get the time to checkpoint that the launcher was told to give them.

        Raises ``LookupError`` where its number is that of another process, whatever the files of the folder say: that
        one is left alone.
        """
        if began(self.id) is None:
            return  # it has ended
        try:
            held = os.pidfd_open(int(self.id))  # its number is not given away while it is asked for
        except ProcessLookupError:
            return
        try:
            if not self._is_ours():
                raise LookupError(f"process {self.id} is not the job of {self.folder}, and is left alone")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(held, signal.SIGTERM)
        finally:
            os.close(held)

    def _is_ours(self) -> bool:
        """Whether the process of this number lives, is the user's, began when the job did, and runs this folder."""
        since = began(self.id)
        if since is None or self.facts.started not in ("", since):
            return False
        try:
            process = Path(f"/proc/{self.id}")
            words, owner = (process / "cmdline").read_bytes().split(b"\0"), process.stat().st_uid
        except OSError:
            return False
        if not any(words) and self.facts.started:  # while it becomes python
            return owner == os.geteuid()
        runs = (b"dtrain.launchers.background", self.facts.launcher.encode(), str(self.folder).encode())
        return owner in (os.geteuid(), 0) and any(runs == tuple(words[at : at + 3]) for at in range(len(words)))


def began(pid: str) -> str | None:
    """What tells a living process of this machine from all others with its number: the boot, and its start in ticks."""
    if not re.fullmatch("[1-9][0-9]{0,9}", str(pid)):
        return None
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot} {after_name[19]}" if after_name[0] not in "ZX" else None


def main(launcher: str, folder: Path) -> None:
    """Run the job to its end."""
    try:
        settings, program = stored(launcher, folder / "background.json")
    except Damaged as damage:
        raise SystemExit(f"{folder / 'background.json'} is damaged ({damage}); submit the job again") from damage
    command = rank_command(program, folder, settings["python"])
    ours = {FOLDER: str(rank_files(folder)), HANG_SECONDS: f"{settings['hang_seconds']:g}"}
    settings["environment"] = {**settings["environment"], **ours}
    run = _run_mpi if launcher == "mpi" else _run_local
    stopped = run(command, settings, folder)
    code = RankRecord.verdict(folder, settings["workers"])
    reason = "cancelled" if stopped else ENDINGS.get(code, "failed")
    content = {"code": code, "reason": reason, "job": str(os.getpid()), "time": int(time.time())}
    new = folder / "end.json.new"
    new.write_text(json.dumps(content) + "\n")
    os.replace(new, folder / "end.json")


@dataclass(frozen=True)
class _Stored:
    settings: object
    program: tuple[str, ...]


def stored(launcher: str, path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `start` wrote: the launcher's settings, and the program. Raises ``Damaged`` for anything else."""
    with trusted.opened(path) as file:
        found = shaped(_Stored, json_of(file.read().decode(errors="replace")))
    settings = shaped(MpiLauncher if launcher == "mpi" else LocalLauncher, found.settings)
    if not found.program:
        raise Damaged("it has no program")
    return dict(vars(settings)), found.program


def _run_local(command: list[str], settings: Mapping[str, Any], folder: Path) -> bool:
    """Run the ranks; whether they were asked to stop."""
    ending = launch(
        command, workers=settings["workers"], log_folder=folder / "logs" / "agent",
        max_restarts=settings["max_restarts"], grace_seconds=settings["grace_seconds"],
        threads_per_worker=settings["threads_per_worker"], environment=settings["environment"],
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
        if ended.signal or RankRecord.verdict(folder, settings["workers"]) != FAILED:
            return bool(ended.signal)
    return False


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
