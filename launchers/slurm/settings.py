"""What a job asks Slurm for: the keys of ``launcher=slurm``. Names are sbatch's own where it has one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.launchers.launcher import Allocation, Keys, not_negative, one_of, out_of_range

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
class SlurmSettings(Allocation, Keys):
    """A request to Slurm, by its keys. Empty and 0 mean: as the site has it."""

    name: str = "slurm"
    max_restarts: int = not_negative(3)
    array_parallel: int = not_negative(0)
    """How many runs of a sweep may run at the same time; 0: all."""
    per_node: str = one_of("srun", "torchrun")
    """``srun``: one task per rank. ``torchrun``: one task per node, whose torchrun starts its ranks."""
    isolate: str = one_of("none", "replica")
    """``replica``: a job step per replica, so that a dead one does not take the others with it."""
    signal_seconds: int = not_negative(120)
    """The ranks are told this long before the time limit; 0: not at all."""
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

    @property
    def components(self) -> tuple[Group, ...]:
        """``groups``, read. Raises ``ValueError`` for one that is none, which `problems` names."""
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

    def steps(self, replicas: int) -> int:
        """How many job steps a program of so many replicas has."""
        return replicas if self.isolate == "replica" else 1

    def problems(self, replicas: int = 1) -> list[str]:
        """What cannot be right wherever it is submitted; each with the value and the way out."""
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
            *self._steps(self.steps(replicas), nodes, workers),
            *self._container(),
            *self._unwritable(),
        ]

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
