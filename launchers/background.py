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
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from dtrain.launchers import job_list, mpi, rank, registry
from dtrain.launchers import trust as trusted
from dtrain.launchers.elastic_agent import launch
from dtrain.launchers.environment import ALLOCATED, CLUSTER
from dtrain.launchers.exit_codes import ENDINGS, FAILED
from dtrain.launchers.inherited_environment import Kept, handed_on
from dtrain.launchers.job import ENDED, Facts, Job, Program, State, command_of
from dtrain.launchers.launcher import Allocation, Keys, Launcher, not_negative
from dtrain.launchers.probe import FOLDER, HANG_SECONDS
from dtrain.launchers.records import ATTEMPT, RankRecord, keep_attempt, rank_files, write_end
from dtrain.launchers.strict_json import Damaged, json_of, shaped

__all__ = ["BackgroundJob", "BackgroundLauncher", "LocalLauncher", "MpiLauncher"]


class BackgroundLauncher(Launcher, Protocol):
    """A launcher whose jobs are background processes of this machine, which call `run`."""

    def run(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> bool:
        """Run ``command`` as every rank, to the end; whether a signal has ended them."""


def start(launcher: BackgroundLauncher, program: Program, *, folder: Path, name: str) -> Job:
    """Start the background process of a job and return when it has a process id."""
    trusted.make_folder(folder)
    running = BackgroundJob.of(folder)
    if running is not None and running.state() not in ENDED:
        raise ValueError(f"{folder} holds job {running.id}, which still runs; cancel it, or choose another folder")
    for stale in ("end.json", "job.json"):
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(rank_files(folder), ignore_errors=True)  # another job's
    command = command_of(program, folder, python=launcher.python)
    # Its environment may hold secrets.
    content = json.dumps({"settings": dataclasses.asdict(cast(Any, launcher)), "program": command}) + "\n"
    trusted.write_private(folder / "background.json", content.encode())
    (folder / "logs").mkdir(exist_ok=True)
    argv = [sys.executable, "-P", "-m", "dtrain.launchers.background", launcher.name, str(folder)]
    with (folder / "logs" / "batch.log").open("ab") as log:
        # The shell exits at once, so that the job is no child of this process and outlives it.
        started = subprocess.run(
            ["sh", "-c", 'setsid "$@" <&- >&2 & echo $!', "sh", *argv], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=log, text=True, check=True, env=handed_on(os.environ, launcher.keeps),
        )  # fmt: skip
    facts = Facts(
        id=started.stdout.strip(), launcher=launcher.name, name=name, folder=str(folder), program=command,
        workers=launcher.workers, submitted=time.time(), started=began(started.stdout.strip()) or "",
    )  # fmt: skip
    facts.write()
    job_list.add(facts)
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
        return None if registry.job_class(facts.launcher).scheduled else cls(facts)

    def ask(self) -> State:
        """Whether its process lives; one that has reused its id is another."""
        return "running" if self._is_ours() else "lost"

    def cancel(self) -> None:
        """SIGTERM: the ranks have the launcher's grace_seconds to checkpoint.

        Raises ``LookupError`` where its id is that of another process, which is left alone, whatever the folder's files
        say.
        """
        if began(self.id) is None:
            return  # it has ended
        try:
            process = os.pidfd_open(int(self.id))  # keeps its id from being reused
        except ProcessLookupError:
            return
        try:
            if not self._is_ours():
                raise LookupError(f"process {self.id} is not the job of {self.folder}, and is left alone")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGTERM)
        finally:
            os.close(process)

    def _is_ours(self) -> bool:
        """Whether the process of this id lives, is the user's, began when the job did, and runs this folder."""
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
    """What tells a living process of this machine from all others with its id: the boot, and its start in ticks."""
    if not re.fullmatch("[1-9][0-9]{0,9}", str(pid)):
        return None
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot} {after_name[19]}" if after_name[0] not in "ZX" else None


@dataclass(frozen=True, kw_only=True)
class LocalLauncher(Keys):
    """Starts ``workers`` ranks on this machine, under torch's elastic agent; see `dtrain.launchers.elastic_agent`."""

    name: str = "local"

    job_class: ClassVar[type[Job]] = BackgroundJob
    keeps: ClassVar[Kept] = "job"
    here: ClassVar[bool] = True

    def problems(self, replicas: int = 1) -> list[str]:
        """Also refuses several nodes."""
        if self.nodes > 1:
            return [f"launcher=local has one node, but launcher.nodes={self.nodes}: take launcher=slurm or mpi"]
        return super().problems(replicas)

    def check(self, folders: Sequence[Path]) -> None:
        """Whether this machine, where the ranks run, has the interpreter and the network interfaces."""
        problems = []
        if self.python and shutil.which(self.python) is None:
            problems.append(f"launcher.python={self.python}: there is no such interpreter on this machine")
        interfaces = sorted(name for _, name in socket.if_nameindex())
        missing = [name for name in self.interface.split(",") if name and name not in interfaces]
        if missing:
            problems.append(
                f"launcher.interface={self.interface}: this machine has no network interface {', '.join(missing)}, "
                f"only {', '.join(interfaces)}; leave it out: ranks of one machine meet on its loopback interface"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job", replicas: int = 1) -> str:
        """The command of each rank."""
        command = rank.command(command_of(program, folder, python=self.python), folder, self.python)
        return f"# {self.workers} ranks on this machine, each:\n{shlex.join(command)}\n"

    def start(self, program: Program, *, folder: Path, name: str = "job", replicas: int = 1) -> Job:
        """Start the background process; see `dtrain.launchers.launcher.Launcher`."""
        return start(self, program, folder=folder.absolute(), name=name)

    def run(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> bool:
        """Run the ranks to their end, in the background process; whether they were asked to stop."""
        ending = launch(
            command, workers=self.workers, log_folder=folder / "logs" / "agent", max_restarts=self.max_restarts,
            grace_seconds=self.grace_seconds, threads_per_worker=self.threads_per_worker, environment=environment,
        )  # fmt: skip
        return ending.kind == "signalled"


@dataclass(frozen=True, kw_only=True)
class MpiLauncher(Allocation, Keys):
    """Starts ``workers`` ranks under mpirun: on ``hosts``, on the nodes of a Slurm allocation, or on this machine.

    With ``nodes`` and neither of the first two it asks Slurm for nodes to run in.
    """

    name: str = "mpi"
    address: str = ""
    """Where the ranks meet; empty: the first host."""
    port: int = not_negative(0)
    """0: a free one."""
    mpirun: str = ""
    """The mpirun to use; empty: the one on PATH."""
    hosts: tuple[str, ...] = ()
    """``HOST`` or ``HOST:SLOTS``; empty: the nodes of the Slurm allocation around it, else this machine."""
    mpi_args: tuple[str, ...] = ()
    """Further arguments of mpirun."""

    job_class: ClassVar[type[Job]] = BackgroundJob
    keeps: ClassVar[Kept] = "allocation"
    has_mpi: ClassVar[bool] = True

    @property
    def login_host(self) -> bool:
        """Where it asks Slurm for nodes."""
        return self._needs_nodes(os.environ)

    @property
    def one_machine(self) -> bool:
        """One node, and no hosts."""
        return self.nodes == 1 and not self.hosts

    @property
    def same_files(self) -> bool:
        """Unless it runs on named hosts."""
        return not self.hosts

    def allocation(self, variables: Mapping[str, str]) -> Sequence[str] | None:
        """The nodes to ask for, where none are named and this process is in no allocation."""
        if not self._needs_nodes(variables):
            return None
        wanted = {
            "nodes": self.nodes, "ntasks-per-node": self.workers // self.nodes, "time": self.minutes,
            "cpus-per-task": self.threads_per_worker, "partition": self.partition, "account": self.account,
            "qos": self.qos, "constraint": self.constraint, "gpus-per-node": self.gpus_per_node,
            "exclude": self.exclude, "reservation": self.reservation,
            "mem": f"{self.memory_gib}G" if self.memory_gib else "",
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in wanted.items() if value]

    def problems(self, replicas: int = 1) -> list[str]:
        """Also refuses keys of an allocation where none is asked for."""
        return [*super().problems(replicas), *self.unused_keys()]

    def unused_keys(self, variables: Mapping[str, str] = os.environ) -> list[str]:
        """The keys for Slurm that are set although Slurm is not asked for nodes."""
        if self._needs_nodes(variables) or ALLOCATED in variables:
            return []
        changed = [
            (key.name, value)
            for key in dataclasses.fields(Allocation)
            if (value := getattr(self, key.name)) != key.default
        ]
        return [
            f"launcher.{key}={value} is for the nodes that launcher=mpi asks Slurm for, and it asks for none where the "
            "ranks run on launcher.hosts, on one node or in an allocation: leave it out"
            for key, value in changed
        ]

    def check(self, folders: Sequence[Path]) -> None:
        """Whether there is an mpirun."""
        _found(self.mpirun)

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job", replicas: int = 1) -> str:
        """The mpirun line."""
        mpirun, nodes = _found(self.mpirun), mpi.nodes_of_slurm()
        ranks = mpi.complete(mpirun, self._ranks(self.variables()), nodes=nodes)
        command = rank.command(command_of(program, folder, python=self.python), folder, self.python)
        here = mpi.names_of_this_host()
        return shlex.join(mpi.line(mpirun, command, ranks, nodes=nodes, root=os.geteuid() == 0, here=here)) + "\n"

    def start(self, program: Program, *, folder: Path, name: str = "job", replicas: int = 1) -> Job:
        """Start the background process; see `dtrain.launchers.launcher.Launcher`."""
        return start(self, program, folder=folder.absolute(), name=name)

    def run(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> bool:
        """Run the ranks, again after a failure, in the background process; whether they were asked to stop."""
        mpirun = _found(self.mpirun)
        for attempt in range(self.max_restarts + 1):
            os.environ[ATTEMPT] = str(attempt)
            keep_attempt(folder)
            print(f"{time.strftime('%F %T')} dtrain: attempt {attempt + 1}", flush=True)  # into batch.log
            ended = mpi.run(
                mpirun, command, self._ranks(environment), log=folder / "logs" / "batch.log",
                grace_seconds=self.grace_seconds,
            )  # fmt: skip
            if ended.signal or RankRecord.verdict(folder, self.workers) != FAILED:
                return bool(ended.signal)
        return False

    def _needs_nodes(self, variables: Mapping[str, str]) -> bool:
        return self.nodes > 1 and not self.hosts and "SLURM_JOB_ID" not in variables

    def _ranks(self, environment: Mapping[str, str]) -> mpi.Ranks:
        variables = {"OMP_NUM_THREADS": str(self.threads_per_worker), **environment}
        if CLUSTER in os.environ:
            # Its hosts are one machine: the shared memory that MPICH finds there would bypass the links.
            variables.setdefault("UCX_TLS", "tcp,self")
        variables |= {ATTEMPT: os.environ[ATTEMPT]} if ATTEMPT in os.environ else {}
        return mpi.Ranks(
            workers=self.workers, hosts=self.hosts, environment=variables, extra=self.mpi_args, address=self.address,
            port=self.port,
        )  # fmt: skip


def _found(name: str) -> mpi.Mpirun:
    try:
        return mpi.find_mpirun(name or "mpirun")
    except mpi.NoMpirun as error:
        raise ValueError(str(error)) from error


def main(launcher: str, folder: Path) -> None:
    """Run the job to its end."""
    try:
        settings, program = stored(launcher, folder / "background.json")
    except Damaged as damage:
        raise SystemExit(f"{folder / 'background.json'} is damaged ({damage}); submit the job again") from damage
    command = rank.command(program, folder, settings.python)
    ours = {FOLDER: str(rank_files(folder)), HANG_SECONDS: f"{settings.hang_seconds:g}"}
    stopped = settings.run(command, folder, {**settings.variables(), **ours})
    code = RankRecord.verdict(folder, settings.workers)
    reason = "cancelled" if stopped else ENDINGS.get(code, "failed")
    write_end(folder, code, reason, job=str(os.getpid()))


@dataclass(frozen=True)
class _Stored:
    settings: object
    program: tuple[str, ...]


def stored(launcher: str, path: Path) -> tuple[BackgroundLauncher, tuple[str, ...]]:
    """Read what `start` wrote: the launcher, and the program. Raises ``Damaged`` for anything else."""
    with trusted.opened(path) as file:
        content = shaped(_Stored, json_of(file.read().decode(errors="replace")))
    if not content.program:
        raise Damaged("it has no program")
    return cast(BackgroundLauncher, shaped(registry.launcher_class(launcher), content.settings)), content.program


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
