"""Slurm's client commands: run with a time limit, their answers read without sacct and without JSON.

Accounting is often off, `--json` differs between versions, and a controller that is busy may hang for minutes.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dtrain.launchers.environment import CLUSTER
from dtrain.launchers.inherited_environment import handed_on
from dtrain.launchers.job import SchedulerError, State

__all__ = [
    "Cluster", "SlurmError", "ask", "cluster", "count_of", "job_line", "job_record", "job_state", "partitions", "since",
]  # fmt: skip

CLUSTERS = Path("/run/dtrain")  # where those of `dtrain cluster` have their files

SECONDS = 30.0
SILENT = ("Unable to contact slurm controller", "resolve_ctls_from_dns_srv", "fetch_config", "configuration source")
NO_CONTROLLER = "reaches no Slurm controller"
STATES: dict[str, State] = {
    "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending", "SPECIAL_EXIT": "pending", "RESV_DEL_HOLD": "pending", "PREEMPTED": "failed",
    "RUNNING": "running", "COMPLETING": "running", "SUSPENDED": "running", "STOPPED": "running",
    "SIGNALING": "running", "STAGE_OUT": "running", "RESIZING": "running", "COMPLETED": "finished",
    "CANCELLED": "cancelled", "FAILED": "failed", "TIMEOUT": "failed", "NODE_FAIL": "failed",
    "BOOT_FAIL": "failed", "DEADLINE": "failed", "OUT_OF_MEMORY": "failed", "REVOKED": "failed",
}  # fmt: skip
"""A preempted job is PENDING where Slurm or its script restarts it, and PREEMPTED where neither could."""


class SlurmError(SchedulerError):
    """Slurm refused or did not answer; the message is its own, with the request."""


def ask(*command: str, seconds: float = SECONDS) -> str:
    """What a Slurm command prints. Raises ``SlurmError`` if it is missing, fails or does not answer."""
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"there is no {command[0]} on PATH, so this is no machine of a Slurm cluster: go to its login host, or "
            "start a cluster on this one with `dtrain cluster up`"
        )
    try:
        # Without SQUEUE_STATES and its like, which change what is answered.
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False,
            env=handed_on(os.environ, "cluster"),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(command)} did not answer within {seconds:g} s: is slurmctld up?") from error
    if done.returncode:
        answer = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        if any(words in answer for words in SILENT):
            raise SlurmError(
                f"{command[0]} {NO_CONTROLLER} ({answer.splitlines()[0]}): it may be down for now, or this machine has "
                "Slurm's commands and is in no cluster. Go to the cluster's login host, name its slurm.conf in "
                "SLURM_CONF, start a cluster on this machine with `dtrain cluster up`, or take another launcher"
            )
        raise SlurmError(f"{command[0]}: {answer}")
    return done.stdout


def job_state(job_id: str) -> State:
    """The state of a job: from the queue, else from the controller's memory, else from accounting, else "lost"."""
    return STATES.get(_word(job_id), "lost")


def _word(job_id: str) -> str:
    for question in (
        ("squeue", "--noheader", "--jobs", job_id, "--format", "%T"),
        ("scontrol", "show", "job", "--oneliner", job_id),
        ("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job_id, "--format", "State"),
    ):
        try:
            answer = ask(*question)
        except SlurmError as error:
            if _unreachable(str(error)):
                raise  # no answer is no state
            continue
        if question[0] == "scontrol":
            match = re.search(r"JobState=(\w+)", answer)
            if match:
                return match[1]
        elif answer.split():
            return answer.split()[0].rstrip("+")
    return ""


def _unreachable(message: str) -> bool:
    return NO_CONTROLLER in message or "did not answer" in message or "on PATH" in message


def job_line(job_id: str) -> str:
    """What ``scontrol show job`` prints; empty once the controller has forgotten the job.

    Raises ``SlurmError`` where the controller does not answer.
    """
    try:
        return ask("scontrol", "show", "job", "--oneliner", job_id)
    except SlurmError as error:
        if _unreachable(str(error)):
            raise
        return ""


def job_record(job_id: str) -> dict[str, str]:
    """`job_line` by fields; also empty where the controller does not answer."""
    try:
        answer = job_line(job_id)
    except SlurmError:
        return {}
    return {key: value for key, _, value in (word.partition("=") for word in answer.split())}


class Cluster(NamedTuple):
    """A cluster. ``came_up``: seconds since 1970 for one of `dtrain cluster`, whose job ids begin again; else 0."""

    name: str
    came_up: float


def cluster() -> Cluster:
    """The cluster that Slurm's commands talk to from here; its name is empty where there is none."""
    name = os.environ.get(CLUSTER)
    if name:
        return Cluster(name, since(name, os.environ.get("SLURM_CONF")))
    path = shutil.which("scontrol")
    return Cluster(_configured(path, os.environ.get("SLURM_CONF")) if path else "", 0.0)


def since(name: str, configuration: str | None = None) -> float:
    """When the cluster of `dtrain cluster` with this name came up, in seconds since 1970; 0 if it is not up."""
    try:
        # Written once, before the daemons start.
        return Path(configuration or CLUSTERS / name / "slurm.conf").stat().st_mtime
    except OSError:
        return 0.0


@functools.cache
def _configured(scontrol: str, configuration: str | None) -> str:
    """The controller's ClusterName; empty if it does not answer."""
    try:
        match = re.search(r"^ClusterName\s*=\s*(\S+)", ask(scontrol, "show", "config"), re.MULTILINE)
    except SlurmError:
        return ""
    return match[1] if match else ""


@dataclass(frozen=True)
class Partition:
    """A partition as ``sinfo`` shows it.

    ``nodes``: how many; None in an unknown notation. ``minutes``: its time limit, None without one.
    """

    name: str
    default: bool
    nodes: int | None
    minutes: int | None
    up: bool


def partitions() -> list[Partition]:
    """All partitions that this user can see."""
    answer = ask("sinfo", "--noheader", "--summarize", "--format", "%P|%D|%l|%a")
    return [_partition(line.split("|")) for line in answer.splitlines() if line.count("|") == 3]


def _partition(fields: Sequence[str]) -> Partition:
    name, nodes, limit, available = (field.strip() for field in fields)
    up = available.lower().startswith("up")
    return Partition(name.rstrip("*"), name.endswith("*"), count_of(nodes), minutes_of(limit), up)


def count_of(text: str) -> int | None:
    """A number of nodes or CPUs as ``sinfo`` shows it, None for anything else.

    >>> count_of(" 12 "), count_of("1.5K"), count_of("n/a")
    (12, None, None)
    """
    match = re.fullmatch(r"[0-9]{1,9}", text.strip())
    return int(match[0]) if match else None


def minutes_of(limit: str) -> int | None:
    """Slurm's notation of a duration in whole minutes; None for none.

    >>> minutes_of("1-02:00:00"), minutes_of("30:00"), minutes_of("infinite")
    (1560, 30, None)
    """
    match = re.fullmatch(r"(?:([0-9]{1,9})-)?(?:([0-9]{1,2}):)?([0-9]{1,2}):([0-9]{1,2})", limit)
    if match is None:
        return None
    days, hours, minutes, _ = (int(number or 0) for number in match.groups())
    return (24 * days + hours) * 60 + minutes
