"""What a job asks Slurm for. Names are sbatch's own where it has one."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Group", "SlurmSettings", "unwritable"]


MOST_MINUTES = (2**31 - 1) // 60  # Slurm reads a time limit into 32 bits of seconds, and more comes out as nonsense


@dataclass(frozen=True, kw_only=True)
class Group:
    """One component of a heterogeneous job: ``workers`` ranks over ``nodes`` nodes of one sort."""

    nodes: int
    workers: int
    partition: str = ""
    constraint: str = ""
    gpus_per_node: int = 0

    @classmethod
    def parse(cls, text: str) -> Group:
        """From ``nodes=2 workers=4 constraint=a100``. Raises ``ValueError``.

        >>> Group.parse("nodes=2 workers=4 partition=gpu").workers
        4
        """
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        values: dict[str, int | str] = {}
        for word in text.split():
            key, equals, value = word.partition("=")
            if not equals or key not in known or (known[key] == "int" and not re.fullmatch("[0-9]{1,9}", value)):
                raise ValueError(f"{text!r}: {word} is none of {', '.join(f'{key}=...' for key in known)}")
            values[key] = int(value) if known[key] == "int" else value
        if not (values.get("nodes") and values.get("workers")):
            raise ValueError(f"{text!r}: a group says nodes=N and workers=N, both at least 1")
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """A request to Slurm. Empty and 0 mean: as the site has it.

    workers          ranks in all, spread evenly over ``nodes``
    minutes          the time limit of one run of the job; the job goes on after it, from its checkpoint
    per_node         "srun": one task per rank. "torchrun": one task per node, whose torchrun starts its ranks
    replicas         more than 1: a job step for each, so that a dead one does not take the others with it
    groups           the components of a heterogeneous job; then ``nodes`` and ``workers`` are their sums
    max_restarts     attempts in a row without progress, after which the job gives up
    signal_seconds   the ranks get SIGUSR2 this long before the time limit
    hang_seconds     a rank that stands in one collective for longer ends the attempt; 0: never
    address, port    where the ranks meet: by default the job's first node, and a free port
    interface        the network interface of gloo and NCCL
    sbatch           any further directives: "exclusive", "mail-type=END"
    """

    nodes: int = 1
    workers: int = 1
    minutes: int = 60
    cpus_per_worker: int = 1
    gpus_per_node: int = 0
    memory_gib: int = 0
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""
    array_parallel: int = 0
    per_node: Literal["srun", "torchrun"] = "srun"
    replicas: int = 1
    groups: tuple[Group, ...] = ()
    max_restarts: int = 3
    signal_seconds: int = 120
    hang_seconds: float = 600.0
    address: str = ""
    port: int = 0
    interface: str = ""
    python: str = ""
    setup: tuple[str, ...] = ()
    container: str = ""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_args: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What cannot be right wherever it is submitted; each with the value and the way out."""
        found = []
        if self.workers % self.nodes:
            near = self.workers // self.nodes * self.nodes or self.nodes
            found.append(
                f"launcher.workers={self.workers} cannot be spread evenly over launcher.nodes={self.nodes}; choose "
                f"{near} or {near + self.nodes} workers"
            )
        if self.minutes < 1:
            found.append(f"launcher.minutes={self.minutes}: a time limit is at least 1 minute")
        if self.minutes > MOST_MINUTES:
            found.append(
                f"launcher.minutes={self.minutes} is more than Slurm can count, which is {MOST_MINUTES}; the job goes "
                "on after each limit, so 1440, a day, serves as well"
            )
        if self.signal_seconds and self.signal_seconds >= 60 * self.minutes:
            found.append(
                f"launcher.signal_seconds={self.signal_seconds} leaves nothing of a time limit of {self.minutes} "
                "minutes; make launcher.minutes longer or launcher.signal_seconds shorter"
            )
        if self.replicas > 1 and self.workers % self.replicas:
            found.append(f"{self.workers} workers cannot form {self.replicas} job steps of equal size")
        if self.replicas > 1 and (self.per_node == "torchrun" or self.groups):
            found.append("launcher.isolate=replica needs launcher.per_node=srun and no launcher.groups")
        elif self.replicas > 1 and self.nodes % self.replicas and self.replicas % self.nodes:
            found.append(
                f"launcher.isolate=replica: {self.replicas} replicas on launcher.nodes={self.nodes} would share nodes "
                f"unevenly; take {self.replicas} nodes, or a multiple or a divisor of that"
            )
        elif self.replicas > self.nodes and self.gpus_per_node:
            # A step counts its tasks on a node from 0, and so would two ranks take the same GPU.
            found.append(
                f"launcher.isolate=replica: {self.replicas // self.nodes} replicas on each node would take the same "
                f"GPUs; take launcher.nodes={self.replicas} or a multiple, or launcher.isolate=none"
            )
        if not 0 <= self.port < 65536:
            found.append(f"launcher.port={self.port} is no port; choose 1024 to 65535, or 0 for a free one")
        texts = {name: str(getattr(self, name)) for name in _DIRECTIVES}
        for key, text in [*texts.items(), *(("sbatch", text) for text in self.sbatch)]:
            if unwritable(text):
                found.append(f"launcher.{key}={text!r} holds {unwritable(text)}, and is a line of the batch script")
        for directive in self.sbatch:
            key = directive.lstrip("-").partition("=")[0]
            if key in _OURS:
                found.append(f"launcher.sbatch: {directive} is written by dtrain; set {_OURS[key]} instead")
        return found


def unwritable(text: str) -> str:
    """The control character in a text that is to stand in one line of a batch script, in words; empty if none does."""
    found = next((sign for sign in text if ord(sign) < 32 or ord(sign) == 127), "")
    return {"": "", "\n": "a line break"}.get(found, f"the control character {found!r}")


_DIRECTIVES = ("partition", "account", "qos", "constraint", "exclude", "reservation", "address", "interface")

_OURS = {
    "nodes": "launcher.nodes", "ntasks": "launcher.workers", "ntasks-per-node": "launcher.workers",
    "time": "launcher.minutes", "partition": "launcher.partition", "account": "launcher.account",
    "qos": "launcher.qos", "array": "a sweep (dtrain train -m)", "output": "run.dir", "error": "run.dir",
    "open-mode": "nothing (it must be append)", "requeue": "nothing (it is always on)",
    "cpus-per-task": "launcher.threads_per_worker", "signal": "launcher.signal_seconds",
}  # fmt: skip
