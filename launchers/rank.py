"""One rank of a job, whatever started it: ``python -m dtrain.launchers.rank FOLDER -- PROGRAM ARGUMENTS...``.

    srun, mpirun, torchrun -> this process (one per rank) -> the program, with RANK, WORLD_SIZE, MASTER_ADDR, ...

It knows only how the program ended. What the program prints is appended to FOLDER/logs/rank-K.log; how it
ended is left in FOLDER/ranks/rank-K.json; a Python program runs under `dtrain.launchers.probe`. Its exit code is the
program's, or 128 + the number of the signal that killed it; but 0 for a program that exits with 75 or 130, since every
launcher ends the other ranks once one exits with any other code, and they may still be checkpointing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dtrain.launchers import mpi, probe
from dtrain.launchers import trust as trusted
from dtrain.launchers.code_copy import CODE
from dtrain.launchers.elastic_agent import die_with_parent
from dtrain.launchers.environment import Environment
from dtrain.launchers.exit_codes import BAD_CONFIG, ENDED_WELL, FAILED, of_process
from dtrain.launchers.lock import HELD, InUse, held
from dtrain.launchers.records import ATTEMPT, RankRecord, rank_files
from dtrain.launchers.stop_signals import STOP_SIGNALS

RANK = ("-P", "-m", "dtrain.launchers.rank")
"""The arguments of an interpreter that runs this. -P: a folder dtrain in the working directory is not imported."""
LOCK_SECONDS = 120.0  # ranks of a failed attempt, or the command that submitted, may still hold it


def command(program: Sequence[str], folder: Path, python: str = "") -> list[str]:
    """The command line that starts a rank: the program under this process, by ``python``; by default by this one."""
    return [python or sys.executable, *RANK, str(folder), "--", *sent(program)]


def main(arguments: Sequence[str]) -> int:
    """Run the program as this rank; returns its exit code."""
    folder, separator, *program = arguments
    if separator != "--" or not program:
        raise SystemExit("usage: python -m dtrain.launchers.rank FOLDER -- PROGRAM ARGUMENTS...")
    return run(Path(folder), received(program), Environment.read(os.environ))


def run(folder: Path, program: Sequence[str], place: Environment) -> int:
    """Run ``program`` as the rank that ``place`` says, with its log and its record below ``folder``."""
    log, ranks = folder / "logs" / f"rank-{place.rank}.log", rank_files(folder)
    with contextlib.suppress(trusted.Untrusted):  # the log reports it
        trusted.make_folder(folder)
    for needed in (log.parent, ranks):
        needed.mkdir(parents=True, exist_ok=True)
    attempt = int(os.environ.get(ATTEMPT, place.restart))
    record = RankRecord.begin(ranks, place.rank, host=socket.gethostname(), attempt=attempt)
    with log.open("ab") as output:
        header = f"---- rank {place.rank} of {place.world} on {record.host}, attempt {attempt + 1}, "
        output.write(f"{header}{time.strftime('%Y-%m-%d %H:%M:%S')} ----\n".encode())
        output.flush()
        start = output.tell()
        problem = _unreachable(place) or _untrusted(folder)
        if problem is None:
            code = _alone(folder, program, output.fileno(), place)
        else:
            output.write(f"{problem}\n".encode())
            code = BAD_CONFIG
    record.end(ranks, code, log=log, log_start=start)
    code = of_process(code)
    if place.started_by.mpi:
        mpi.leave(code, place.backend)
    return 0 if code in ENDED_WELL else code


def _alone(folder: Path, program: Sequence[str], output: int, place: Environment) -> int:
    """The program's exit code. Rank 0 holds the folder's lock; the other ranks wait for it at the rendezvous."""
    ours = {probe.FOLDER: str(rank_files(folder)), HELD: str(folder), "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **place.export(), **ours}
    if place.rank:
        return _spawn(under_probe(program), environment, output, place)
    try:
        with held(folder, "rank 0 of a job", seconds=LOCK_SECONDS):
            return _spawn(under_probe(program), environment, output, place)
    except InUse as error:
        os.write(output, f"{error}, and was so for {LOCK_SECONDS:g} s: nothing was started\n".encode())
        return FAILED


def under_probe(program: Sequence[str]) -> list[str]:
    """The command line with the probe between a Python interpreter and its script; anything else as it is.

    >>> under_probe(["bash", "run.sh"])
    ['bash', 'run.sh']
    """
    interpreter, *rest = program
    if not Path(interpreter).name.startswith("python"):
        return list(program)
    flags = []
    while rest and rest[0] in ("-u", "-B", "-I", "-E", "-s", "-S", "-O", "-OO", "-P"):
        flags.append(rest.pop(0))
    if not rest or (rest[0].startswith("-") and rest[0] != "-m"):
        return list(program)  # -c, -W, ...: as it is
    return [interpreter, *flags, str(Path(probe.__file__).resolve()), *rest]


def _unreachable(place: Environment) -> str | None:
    """Why this rank could never reach the others, in words; None if MASTER_ADDR resolves."""
    if place.world == 1:
        return None
    host = socket.gethostname()
    if not place.address or not place.port:
        return f"rank {place.rank} on {host}: MASTER_ADDR or MASTER_PORT is not set; start it through a dtrain launcher"
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        return (
            f"rank {place.rank} on {host}: MASTER_ADDR={place.address} does not resolve here ({error}); name the first "
            "node by an address that all nodes know: launcher.address=IP"
        )
    return None


def _untrusted(folder: Path) -> str | None:
    """Why nothing may be loaded from the folder of the job, or from the copy of its code, in words."""
    try:
        trusted.require_own(folder)
        if CODE in os.environ:
            trusted.require_own(Path(os.environ[CODE]))
    except (trusted.Untrusted, FileNotFoundError) as error:
        return f"{error}"
    return None


def _spawn(command: list[str], environment: dict[str, str], output: int, place: Environment) -> int:
    """The program's exit code; -N if signal N killed it."""
    carried = mpi.carried()

    def prepare() -> None:
        die_with_parent()
        for number in carried:
            signal.signal(number, signal.SIG_IGN)

    try:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=prepare,
            close_fds=False,  # a rank of MPICH talks to its mpirun over a descriptor that it inherits
        )  # fmt: skip
    except OSError as error:
        os.write(output, f"cannot start {command[0]}: {error.strerror}\n".encode())
        return BAD_CONFIG
    with _signals(child, carried, forward=not place.started_by.signals_all):
        return child.wait()


@contextlib.contextmanager
def _signals(
    child: subprocess.Popen[bytes], carried: Mapping[signal.Signals, signal.Signals], *, forward: bool
) -> Iterator[None]:
    """The program decides what a signal means; this process only outlives it, to record how it ended.

    ``carried``: signals that stand for others, which the program is sent instead.
    """

    def handle(number: int, _: FrameType | None) -> None:
        meant = carried.get(signal.Signals(number))
        if (forward or meant) and child.poll() is None:
            child.send_signal(meant or number)

    old = {number: signal.signal(number, handle) for number in {*STOP_SIGNALS, *carried}}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


# ---- words on their way through mpirun and srun --------------------------------------------------------------------
# Both take a lone colon for the end of a command. So a word that is nothing but colons gets one more where the command
# line is written, and loses it here.


def sent(words: Iterable[str]) -> list[str]:
    """The words as they stand on the command line of mpirun or srun.

    >>> sent(["train.py", "a", ":", "b:c", "::"])
    ['train.py', 'a', '::', 'b:c', ':::']
    """
    return [f"{word}:" if _colons(word) else word for word in words]


def received(words: Iterable[str]) -> list[str]:
    """The inverse of `sent`.

    >>> received(sent([":", "", "::", "x"]))
    [':', '', '::', 'x']
    """
    return [word[:-1] if _colons(word) else word for word in words]


def _colons(word: str) -> bool:
    return bool(word) and not word.strip(":")


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
