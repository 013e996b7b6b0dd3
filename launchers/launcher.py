"""A launcher: one frozen dataclass, whose fields are the keys of ``launcher`` that it takes, and its capabilities.

    launcher.problems()                                 invalid settings, each with the value and the way out
    launcher.check([folder])                            asks this machine, or the scheduler, whether it would start
    launcher.render(program, folder=..., name=...)      the script or the command, of a dry run
    launcher.start(program, folder=..., name=...)       starts it -> Job
    launcher.submit(program, folder=..., name=...)      problems, check and start, for programs

Launchers differ by their capabilities, which are class attributes; no code tests for a name. A new one is a dataclass
that extends `Keys`, and a line of `dtrain.launchers.registry`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from dtrain.launchers.inherited_environment import Kept
from dtrain.launchers.job import Job, Program
from dtrain.launchers.rendezvous import INTERFACES

__all__ = ["Allocation", "ArrayLauncher", "Keys", "Launcher", "at_least_one", "not_negative", "one_of"]


class Readable(Protocol):
    """The keys of every launcher, read-only; `Keys` defines them."""

    @property
    def name(self) -> str:
        """What it is called in ``launcher=NAME``."""

    @property
    def workers(self) -> int:
        """Ranks in all."""

    @property
    def nodes(self) -> int:
        """Machines that they are spread over."""

    @property
    def max_restarts(self) -> int:
        """How often all ranks are started again after a failure."""

    @property
    def grace_seconds(self) -> float:
        """The ranks' time between a stop signal and SIGKILL."""

    @property
    def threads_per_worker(self) -> int:
        """CPU cores of a rank."""

    @property
    def hang_seconds(self) -> float:
        """How long a rank may block in one collective; 0: for ever."""

    @property
    def wait(self) -> bool:
        """Whether to follow a job that runs on its own to its end."""

    @property
    def environment(self) -> tuple[str, ...]:
        """``NAME=value``, set for every rank."""

    @property
    def python(self) -> str:
        """The interpreter of the ranks; empty: this one."""


class Launcher(Readable, Protocol):
    """How the ranks of a job start. Instances hold the settings, and are equal if these are."""

    job_class: ClassVar[type[Job]]
    keeps: ClassVar[Kept]
    """Which variables of a Slurm job around the command its own jobs inherit."""
    here: ClassVar[bool]
    """Its ranks run on this machine, with its files; `dtrain train` starts them itself, and stays."""
    has_mpi: ClassVar[bool]
    """mpirun starts its ranks, so MPI may carry their messages."""
    arrays: ClassVar[bool]
    """A sweep is one job array: it is an `ArrayLauncher`."""

    @property
    def login_host(self) -> bool:
        """Whether its commands run on the login host of a cluster; they are moved there where one is up here."""

    @property
    def one_machine(self) -> bool:
        """Whether all of its ranks share a machine, so that no link lies between them."""

    @property
    def same_files(self) -> bool:
        """Whether its ranks see the programs of this machine: no container, no other host's disks."""

    def allocation(self, variables: Mapping[str, str]) -> Sequence[str] | None:
        """Options of ``salloc`` for the nodes that the command is to run in; None where it needs no such nodes."""

    def replaced(self, **changes: Any) -> Self:
        """The same with other values of some keys."""

    def variables(self) -> dict[str, str]:
        """``environment`` as a dictionary, with what ``interface`` means."""

    def problems(self, replicas: int = 1) -> list[str]:
        """Settings that are invalid wherever it runs, key by key. ``replicas``: of the program's mesh."""

    def warnings(self) -> list[str]:
        """Settings of the shell that it does not use."""

    def check(self, folders: Sequence[Path]) -> None:
        """Raise ``ValueError`` for what would be refused, or accepted and never start; nothing is written."""

    def render(self, program: Sequence[str], *, folder: Path, name: str = "job", replicas: int = 1) -> str:
        """The exact script or command that `start` would use; nothing is written. Raises ``ValueError``."""

    def start(self, program: Program, *, folder: Path, name: str = "job", replicas: int = 1) -> Job:
        """Start ``program`` once per rank, with its files in ``folder``; returns at once.

        Call `problems` and `check` before. Raises ``ValueError`` for a request that is refused (what, value, way out),
        ``RuntimeError`` where the scheduler did not answer. In both cases nothing was started.
        """


class ArrayLauncher(Launcher, Protocol):
    """A launcher that starts a job for each of many folders at once; "{folder}" in the program stands for its own."""

    @property
    def same_replicas(self) -> bool:
        """Whether all of them must have equally many replicas."""

    def render_array(
        self, program: Sequence[str], *, folders: Sequence[Path], name: str = "sweep", replicas: int = 1
    ) -> str:
        """As `render`."""

    def start_array(
        self, program: Sequence[str], *, folders: Sequence[Path], name: str = "sweep", replicas: int = 1
    ) -> Sequence[Job]:
        """As `start`."""


def at_least_one(default: int, unit: str = "") -> int:
    """A key whose value is 1 or more."""
    return field(default=default, metadata={"least": 1, "unit": unit})


def not_negative(default: float) -> Any:
    """A key whose value is 0 or more."""
    return field(default=default, metadata={"least": 0})


def one_of(*choices: str) -> str:
    """A key whose value is one of these; the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys that every launcher takes, and default capabilities. Empty text and 0 mean: the site's default.

    The command line starts from 4 workers and 3 restarts (`dtrain.train.config.schema`).
    """

    name: str = ""
    workers: int = at_least_one(1)
    """Ranks in all, spread evenly over ``nodes``."""
    nodes: int = at_least_one(1)
    max_restarts: int = not_negative(0)
    """How often all workers are started again from the last checkpoint when one dies; under Slurm, how many attempts
    in a row may make no progress."""
    grace_seconds: float = not_negative(60.0)
    """The workers' time between SIGTERM and SIGKILL, to write a checkpoint."""
    threads_per_worker: int = at_least_one(1)
    """CPU cores of a rank."""
    hang_seconds: float = not_negative(600.0)
    """A rank that blocks in one collective for longer ends the attempt; 0: never."""
    wait: bool = False
    """Follow a submitted job to its end."""
    environment: tuple[str, ...] = ()
    """``NAME=value``, set for every rank."""
    snapshot: bool = True
    """Slurm: run a copy of the code, taken when the job is submitted, which lies in its folder."""
    interface: str = ""
    """The network interface of gloo and NCCL."""
    python: str = ""
    """The interpreter on the nodes; empty: this one."""

    here: ClassVar[bool] = False
    has_mpi: ClassVar[bool] = False
    arrays: ClassVar[bool] = False

    @property
    def login_host(self) -> bool:
        """Its commands run where they are given."""
        return False

    @property
    def one_machine(self) -> bool:
        """Whether there is one node."""
        return self.nodes == 1

    @property
    def same_files(self) -> bool:
        """Its ranks see what is seen here."""
        return True

    def allocation(self, variables: Mapping[str, str]) -> Sequence[str] | None:
        """None."""
        return None

    def replaced(self, **changes: Any) -> Self:
        """The same with other values of some keys."""
        return dataclasses.replace(self, **changes)

    def variables(self) -> dict[str, str]:
        """For the environment of the ranks. Entries without ``=`` are left out: `problems` names them."""
        interfaces = dict.fromkeys(INTERFACES, self.interface) if self.interface else {}
        pairs = (entry.partition("=") for entry in self.environment)
        return {**interfaces, **{name: value for name, equals, value in pairs if equals}}

    def problems(self, replicas: int = 1) -> list[str]:
        """Values out of range; if there are none, settings that do not fit each other."""
        return out_of_range(self) or [*self._malformed(), *self._uneven()]

    def warnings(self) -> list[str]:
        """None."""
        return []

    def check(self, folders: Sequence[Path]) -> None:
        """Nothing is asked."""

    def submit(self: Launcher, program: Program, *, folder: Path, name: str = "job", replicas: int = 1) -> Job:
        """Start a job as `Launcher.start` does, after all checks. Raises ``ValueError`` and ``RuntimeError``."""
        if problems := self.problems(replicas):
            raise ValueError("\n".join(problems))
        self.check([folder])
        return self.start(program, folder=folder, name=name, replicas=replicas)

    def _malformed(self) -> list[str]:
        pairs = ((entry, entry.partition("=")) for entry in self.environment)
        return [
            f"launcher.environment: {entry!r} is not NAME=value"
            for entry, (name, equals, _) in pairs
            if not equals or not name.isidentifier()
        ]

    def _uneven(self) -> list[str]:
        if self.workers % self.nodes == 0:
            return []
        near = self.workers // self.nodes * self.nodes or self.nodes
        return [
            f"launcher.workers={self.workers} cannot be spread evenly over launcher.nodes={self.nodes}; choose "
            f"{near} or {near + self.nodes} workers"
        ]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The keys of launchers that ask Slurm for nodes. Empty text and 0 mean: the site's default."""

    minutes: int = at_least_one(60, " minute")
    """The time limit of one run of the job, which resumes after it."""
    gpus_per_node: int = not_negative(0)
    memory_gib: int = not_negative(0)
    """Per node."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""


def out_of_range(launcher: Keys) -> list[str]:
    """The keys whose values are too small or not among the choices, in words."""
    problems = []
    for key in dataclasses.fields(launcher):
        value, least, choices = getattr(launcher, key.name), key.metadata.get("least"), key.metadata.get("choices")
        if least == 1 and value < 1:
            problems.append(f"launcher.{key.name} must be at least 1{key.metadata['unit']}, but is {value}")
        elif least == 0 and not (value >= 0 and math.isfinite(value)):
            problems.append(f"launcher.{key.name} must be 0 or more, but is {value}")
        elif choices and value not in choices:
            problems.append(f"launcher.{key.name} is {value} (there are {', '.join(choices)})")
    return problems
