"""The attempts of a Slurm job, from within its batch script: where the ranks meet, and whether they start again.

    job.sbatch (bash)    directives, environment, setup; it execs this process
    this process         attempt -> start_ranks of the script (srun, a task for each rank) -> how did it end? -> again?

After every attempt it decides by the ranks' records, and by Slurm's state of the job:

    finished, wrong configuration, ended by the user     the job is over: end.json records how
    a rank failed                                        again, here, unless max_restarts attempts had no progress
    time limit, preemption, a signal from Slurm          requeued: Slurm starts the script again
    cancelled                                            over; where the cause is unknown, it is not requeued

Slurm ends a job with SIGTERM to this process and to all that it has started. It stays until the ranks have ended and
their end is recorded; its own queries to Slurm ignore the signal, as a missing answer must not mean "restart".
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain.launchers import exit_codes
from dtrain.launchers.environment import SECONDS_LEFT
from dtrain.launchers.exit_codes import BAD_CONFIG, ENDINGS, FAILED, FINISHED, INTERRUPTED, RUN_AGAIN
from dtrain.launchers.records import ATTEMPT, RankRecord, first_cause, keep_attempt, write_end

__all__ = ["Job", "Over", "Slurm", "run"]

PATIENCE = "DTRAIN_PATIENCE_SECONDS"
"""Environment: for how long to ask a controller that does not answer."""
PATIENCE_SECONDS = 30.0
STEPS_SECONDS = 600.0  # until the ranks of the attempt before have ended
SHORT_SECONDS = 600.0  # an attempt that took longer counts as progress
LEAST_SECONDS = 120  # of the time limit, for another attempt here
PORTS, FIRST_PORT = 12000, 20000

Cause = Literal["signal", "slurm", "preemption", "limit", "user", "nobody"]
"""Who ended the ranks: a signal or they themselves, Slurm (which restarts the job), ...; ``nobody``: unknown."""

Start = Callable[[Mapping[str, str]], int]
"""Starts all ranks with these variables, and waits for them; returns the largest exit code of srun."""


class Over(Exception):
    """The job ends, with this exit code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class Job:
    """The script's arguments. ``address`` and ``port``: where the ranks meet; empty and 0: chosen here."""

    folder: Path
    workers: int
    max_restarts: int
    address: str = ""
    port: int = 0


class Slurm:
    """This run of the job, and Slurm's answers about it."""

    def __init__(self, variables: Mapping[str, str] = os.environ) -> None:
        self.id, self.nodes = variables["SLURM_JOB_ID"], variables.get("SLURM_JOB_NODELIST", "")
        self.name = variables.get("SLURM_ARRAY_JOB_ID", self.id)
        self.restarts = int(variables.get("SLURM_RESTART_COUNT", "0") or 0)
        self._all = [self.id, *(value for key, value in variables.items() if key.startswith("SLURM_JOB_ID_HET_GROUP_"))]
        self._patience = float(variables.get(PATIENCE, PATIENCE_SECONDS))

    def head(self) -> str:
        """The first node. Raises `Over` if scontrol cannot name it."""
        lines = self._output("scontrol", "show", "hostnames", self.nodes).splitlines()
        if not lines:
            raise Over(BAD_CONFIG, "scontrol cannot name the nodes of the job")
        return lines[0]

    def address_of(self, node: str) -> str:
        """Slurm's address of a node; empty if unknown."""
        match = re.search(r" NodeAddr=(\S+)", self._output("scontrol", "show", "node", "--oneliner", node))
        return match[1] if match else ""

    def seconds_left(self) -> int | None:
        """Until the time limit; None without one, or if unknown."""
        lines = self._output("squeue", "--noheader", "--jobs", self.id, "--format", "%L").splitlines()
        return next((left for line in lines if (left := seconds_of(line)) is not None), None)

    def steps(self) -> frozenset[str] | None:
        """The job's steps, without those of Slurm itself; None where Slurm does not answer."""
        query = ("squeue", "--noheader", "--steps", "--jobs", ",".join(self._all), "--format", "%i")
        listed = self._query(*query)
        if listed is None:
            return None
        return frozenset(word for word in listed.split() if re.search(r"\.[0-9]+$", word))

    def cancel_steps(self, steps: frozenset[str]) -> None:
        """End job steps."""
        self._query("scancel", *sorted(steps))

    def requeue(self) -> bool:
        """Have Slurm start the job again; whether it will."""
        return self._query("scontrol", "requeue", self.id, show=True) is not None

    def who_ended_it(self) -> Cause:
        """Who ended the ranks, by the state of the job."""
        fields = self._fields()
        if not fields:
            return "nobody"
        state = fields.get("JobState", "")
        if state == "RUNNING":
            return "preemption" if _preempted(fields) else "signal"
        if state in ("PREEMPTED", "TIMEOUT"):
            return "preemption" if state == "PREEMPTED" else "limit"
        # COMPLETING, without a reason; but a requeue counts as a restart at once
        restarts, left = fields.get("Restarts", ""), self.seconds_left()
        if restarts.isdecimal() and int(restarts) > self.restarts:
            return "slurm"
        if _preempted(fields):
            return "preemption"
        return "limit" if left is not None and left <= 1 else "user"

    def _fields(self) -> dict[str, str]:
        """Slurm's record of the job, by fields; empty if the controller does not answer."""
        pause = self._patience / 10
        for _ in range(10):
            line = next(iter(self._output("scontrol", "show", "job", "--oneliner", self.id).splitlines()), "")
            if line.strip():
                fields: dict[str, str] = {}
                for key, _, value in (word.partition("=") for word in line.split()):
                    fields.setdefault(key, value)
                return fields
            time.sleep(pause)
        return {}

    def _output(self, *command: str) -> str:
        return self._query(*command) or ""

    def _query(self, *command: str, show: bool = False) -> str | None:
        """What a command of Slurm's prints; None where it fails. It ignores the signal that ends the job."""
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=None if show else subprocess.DEVNULL,
                text=True, errors="replace", check=False, env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
                preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
            )  # fmt: skip
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None


def seconds_of(text: str) -> int | None:
    """Slurm's notation of a time that is left, in seconds; None for anything else.

    >>> seconds_of("1-00:00:10"), seconds_of("30:00"), seconds_of("UNLIMITED")
    (86410, 1800, None)
    """
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+(?::[0-9]+)*)", text.strip())
    if match is None:
        return None
    seconds = 0
    for number in match[2].split(":"):
        seconds = 60 * seconds + int(number)
    return 86400 * int(match[1] or 0) + seconds


def _preempted(fields: Mapping[str, str]) -> bool:
    """Whether it was preempted in this run: then it was not the user, even if Slurm does not restart it (CANCEL)."""
    when = fields.get("PreemptTime", "")
    return when[:1].isdecimal() and when >= fields.get("StartTime", "")


def run(job: Job, slurm: Slurm, start: Start) -> int:
    """Run the ranks until the job is over, or is to resume when Slurm restarts it; returns the exit code."""
    (job.folder / "end.json").unlink(missing_ok=True)
    try:
        address, others = meeting_point(job, slurm), slurm.steps() or frozenset()
        code = _attempt(job, slurm, start, address)
        while code is None:
            _end_steps(slurm, others)  # ranks whose srun has died would keep training beside the new ones
            code = _attempt(job, slurm, start, address)
        return code
    except Over as over:
        say(f"{over.reason} (exit code {over.code})")
        write_end(job.folder, over.code, over.reason, job=slurm.name)
        return over.code


def _attempt(job: Job, slurm: Slurm, start: Start, address: str) -> int | None:
    """One attempt; the exit code if Slurm is to start the job again, None for another one here. Raises `Over`."""
    number = _count(job, slurm)
    keep_attempt(job.folder)
    before, began = _progress(job), time.monotonic()
    say(f"attempt {number + 1} on {slurm.nodes}, meeting at {address}")
    left = slurm.seconds_left()
    code = start({
        "MASTER_ADDR": address, "MASTER_PORT": str(choose_port(job, slurm, address, number)), ATTEMPT: str(number),
        SECONDS_LEFT: "" if left is None else str(left),
    })  # fmt: skip
    ended = _exit_code(job, code)
    if ended in (FINISHED, BAD_CONFIG, INTERRUPTED):
        raise Over(ended, "ended by the user after a checkpoint" if ended == INTERRUPTED else ENDINGS[ended])
    who = slurm.who_ended_it()
    if who == "user":
        raise Over(ended, "cancelled")
    if who == "nobody":
        # It may have been the user. This process still runs, so the ranks may restart, but the job may not.
        if ended == RUN_AGAIN:
            raise Over(ended, "stopped as asked, but Slurm does not say by whom: submit it again")
        who = "signal"
    _require_progress(job, fruitful=_progress(job) != before or time.monotonic() - began >= SHORT_SECONDS)
    if ended == RUN_AGAIN or who != "signal":
        say(f"asked to stop ({who}): the job goes on from its last checkpoint when Slurm starts it again")
        if who != "slurm" and not slurm.requeue():
            raise Over(RUN_AGAIN, f"ended by {who}, and scontrol requeue failed")
        return RUN_AGAIN
    cause = first_cause(job.folder) or f"srun: exit code {code}"
    say(f"the ranks failed ({cause}); they start again from the last checkpoint")
    left = slurm.seconds_left()
    return RUN_AGAIN if left is not None and left < LEAST_SECONDS and slurm.requeue() else None  # too late for here


def meeting_point(job: Job, slurm: Slurm) -> str:
    """The address of the first node, by its name or as Slurm knows it. Raises `Over` for one that does not resolve."""
    head = slurm.head()
    address = job.address or (head if _resolves(head) else slurm.address_of(head))
    if not _resolves(address):
        here = socket.gethostname()
        where = f"{address}, where the ranks are to meet, does not resolve on {here}"
        raise Over(BAD_CONFIG, f"{where}: set launcher.address")
    return address


def choose_port(job: Job, slurm: Slurm, address: str, attempt: int) -> int:
    """A port that nobody listens on there; that of the job, for which `Over` is raised if it is taken."""
    if job.port:
        if _taken(address, job.port):
            raise Over(
                BAD_CONFIG, f"launcher.port={job.port} is taken on {address}: choose another, or 0 for a free one"
            )
        return job.port
    first = int(slurm.id) * 13 + attempt * 7919
    ports = [FIRST_PORT + (first + 1009 * more) % PORTS for more in range(10)]
    return next((port for port in ports if not _taken(address, port)), ports[-1])


def _exit_code(job: Job, srun: int) -> int:
    """The exit code of the ranks, by their records: srun's own code mixes in the ranks that it killed."""
    ended = RankRecord.verdict(job.folder, job.workers)
    return FAILED if ended == FINISHED and srun else ended


def _end_steps(slurm: Slurm, others: frozenset[str]) -> None:
    """End the steps of the attempt before, and await their end. ``others``: those that were there before."""
    deadline = time.monotonic() + STEPS_SECONDS
    while True:
        steps = slurm.steps()
        if steps is not None and not steps - others:
            return
        if steps is not None:
            slurm.cancel_steps(steps - others)
        if time.monotonic() > deadline:
            raise Over(FAILED, "nobody knows that the ranks of the attempt before have ended")
        time.sleep(1)


def _count(job: Job, slurm: Slurm) -> int:
    """Note that an attempt begins; returns how many there were before."""
    with (job.folder / "attempts").open("a+") as attempts:
        attempts.seek(0)
        number = len(attempts.readlines())
        attempts.write(f"{int(time.time())} {slurm.id} {slurm.restarts} {slurm.nodes}\n")
    return number


def _progress(job: Job) -> str:
    """The last checkpoint."""
    folder = job.folder / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((name for name in names if re.fullmatch("step-[0-9]+", name)), default="")


def _require_progress(job: Job, *, fruitful: bool) -> None:
    """Count the attempts in a row without progress. Raises `Over` for more than the job may have."""
    path = job.folder / "fruitless"
    text = path.read_text().strip() if path.is_file() else ""
    count = 0 if fruitful else (int(text) if text.isdecimal() else 0) + 1
    path.write_text(f"{count}\n")
    if count > job.max_restarts:
        raise Over(FAILED, f"attempts in a row without progress: {count}")


def _resolves(name: str) -> bool:
    try:
        return bool(name) and bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _taken(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def say(text: str) -> None:
    """Into the log of the script."""
    print(f"{time.strftime('%F %T')} dtrain: {text}", flush=True)


def _started_by_bash(folder: Path) -> Start:
    """By the script's function, which has the command line of every srun."""

    def start(variables: Mapping[str, str]) -> int:
        command = ["bash", "-c", 'start_ranks "$1"', "job.sbatch", str(folder)]
        return exit_codes.of_process(subprocess.run(command, env={**os.environ, **variables}, check=False).returncode)

    return start


def main(arguments: Sequence[str]) -> int:
    """Run the job that the batch script describes; returns the exit code of the script."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.launchers.slurm.attempt")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--address", default="")
    parser.add_argument("--port", type=int, default=0)
    job = Job(**vars(parser.parse_args(arguments)))
    # A handler, and not SIG_IGN, which srun and the ranks would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    return run(job, Slurm(), _started_by_bash(job.folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
