"""A job of any launcher: its id, its state, and the files in its folder.

launcher.submit(program, folder) -> Job        job.state()  wait()  logs()  cancel()  result()  why()

FOLDER/job.json       what was submitted, and how          logs/rank-K.log   what rank K printed
       end.json       how it ended, once it has            logs/batch.log    what the script printed
       job.sbatch     what Slurm was given                 ranks/            records, heartbeats, stacks
       function.pkl   results/rank-K.pkl                   where a function was submitted
"""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, cast

from dtrain.launchers import trust as trusted
from dtrain.launchers.strict_json import Damaged, json_in, number_in, shaped

__all__ = ["ENDED", "Facts", "Job", "JobFailed", "Program", "SchedulerError", "State", "command_of"]

State: TypeAlias = Literal["pending", "running", "finished", "failed", "cancelled", "lost"]
"""``lost``: the scheduler no longer knows it, and it has not recorded how it ended."""

LONGEST_NAME = 255
"""Bytes of a file's name."""
ENDED: tuple[State, ...] = ("finished", "failed", "cancelled", "lost")

Program: TypeAlias = Sequence[str] | Callable[[], object]
"""A command line, or a function of no arguments that can be pickled: each rank runs it."""


class SchedulerError(RuntimeError):
    """A scheduler refused or did not answer; the message is its own, with the request."""


class JobFailed(RuntimeError):
    """A job whose result was asked for did not finish; the message starts with the root cause."""


@dataclass(frozen=True)
class Facts:
    """What is known of a job since it was submitted. ``submitted``: seconds since 1970.

    ``cluster``: Slurm's name of its cluster. ``came_up``: when that cluster started, for those of `dtrain cluster`,
    whose job ids begin again each time; else 0. ``started``: what tells a process of this machine from later ones with
    its id.
    """

    id: str
    launcher: str
    name: str
    folder: str
    program: tuple[str, ...]
    workers: int
    submitted: float
    cluster: str = ""
    came_up: float = 0.0
    started: str = ""

    def write(self) -> None:
        """Write FOLDER/job.json, atomically."""
        path = Path(self.folder) / "job.json"
        new = path.with_suffix(".json.new")
        new.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(new, path)

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """Raises ``FileNotFoundError`` where no job was submitted, and ``Damaged`` as `of`."""
        path = folder / "job.json"
        content = json_in(path)
        if content is None and not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        facts = cls.of(content)
        # The folder that the file names is not trusted: processes of another folder are not its own.
        try:
            same = os.path.samefile(facts.folder, folder)
        except (OSError, ValueError):
            same = False
        return facts if same else dataclasses.replace(facts, folder=str(folder.absolute()))

    @classmethod
    def of(cls, content: object) -> Facts:
        """From what `write` wrote, in this version or an older one.

        Raises:
            Damaged: it is something else (a ``ValueError``).
        """
        facts = shaped(cls, content)
        if not re.fullmatch(r"[0-9]{1,18}(_[0-9]{1,9})?", facts.id):
            raise Damaged(f"its id is {facts.id[:40]!r}")
        if any(len(os.fsencode(name)) > LONGEST_NAME for name in Path(facts.folder).parts):
            raise Damaged(f"its folder is {facts.folder[:40]!r}...")
        return facts


class Job(abc.ABC):
    """One submitted job. The subclasses ask its scheduler, and cancel it."""

    scheduled: ClassVar[bool] = False
    """A scheduler runs it: it outlives the command that submitted it, and is asked for on its cluster."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.id, self.folder = facts.id, Path(facts.folder)

    @classmethod
    def located(cls, facts: Facts) -> Facts:
        """The facts of a job that has just been submitted, with the cluster that it was given to, if any."""
        return facts

    def is_here(self) -> bool:
        """Whether its id is valid here: it is of this machine, or of the cluster that is asked from here."""
        return True

    def cluster_is_up(self) -> bool:
        """Whether the cluster that it was given to is known to be up, asked from here or not."""
        return False

    @abc.abstractmethod
    def ask(self) -> State:
        """The state as the scheduler knows it, of a job that has not recorded how it ended."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """End it, for good: it checkpoints if there is time, and is not started again."""

    def nodes(self) -> str:
        """Where it runs, in its scheduler's notation; empty for this machine, or if it has not started."""
        return ""

    def waits_for(self) -> str:
        """The scheduler's reason why it has not started; empty where it has, or without a reason."""
        return ""

    def end(self) -> dict[str, object] | None:
        """How it ended: ``code`` (see `dtrain.errors`) and ``reason``; None while it runs."""
        content = json_in(self.folder / "end.json")
        if not isinstance(content, dict) or str(content.get("job", self.id)) != self.id.partition("_")[0]:
            return None
        valid = type(content.get("code")) is int and isinstance(content.get("reason"), str)
        return cast("dict[str, object]", content) if valid else None

    def state(self) -> State:
        """The state now."""
        end = self.end()
        if end is None:
            state = self.ask()
            if state not in ENDED:
                return state
            end = self.end()  # it may have ended in between
            if end is None:
                return state
        if end["reason"] == "cancelled":
            return "cancelled"
        return "finished" if end["code"] == 0 else "failed"

    def wait(self, seconds: float | None = None) -> State:
        """Wait until it has ended, at most ``seconds``; returns the state. Raises ``TimeoutError``."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while (state := self.state()) not in ENDED:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"job {self.id} is still {state} after {seconds:g} s; its logs: {self.folder}/logs")
            time.sleep(0.5)
        return state

    def logs(self) -> list[Path]:
        """What it has printed so far: the scheduler's shell first, then the ranks in order."""
        folder = self.folder / "logs"
        numbered = [(number_in(path.name, "rank-{}.log"), path) for path in folder.glob("rank-*.log")]
        ranks = [path for number, path in sorted((n, path) for n, path in numbered if n is not None)]
        return [path for path in (folder / "batch.log", *ranks) if path.is_file()]

    def result(self, seconds: float | None = None) -> list[object]:
        """Wait, and return what the function returned on each rank, in rank order.

        Raises ``JobFailed`` with the root cause, ``TimeoutError``, and ``ValueError`` for a job that runs no function,
        and where another user can write to its folder.
        """
        if not (self.folder / "function.pkl").is_file():
            raise ValueError(
                f"job {self.id} runs {list(self.facts.program)}, no function: it has no result but its files"
            )
        if self.wait(seconds) != "finished":
            raise JobFailed(self.why())
        trusted.require_own(self.folder)
        results = []
        for rank in range(self.facts.workers):
            with trusted.opened(self.folder / "results" / f"rank-{rank}.pkl") as file:
                results.append(pickle.load(file))
        return results

    def why(self) -> str:
        """Why it ended as it did, or what it is waiting for: the root cause first."""
        from dtrain.launchers.why import why

        state = self.state()
        waits_for = self.waits_for() if state == "pending" else ""
        return why(self.folder, state=state, end=self.end(), waits_for=waits_for)


def command_of(program: Program, folder: Path, *, python: str = "") -> tuple[str, ...]:
    """The command line of one rank; a function is pickled into the job's folder first.

    A bare ``python`` is the argument ``python``, by default this process's interpreter: PATH on a node may name
    another.
    """
    python = python or sys.executable
    if not callable(program):
        first, *rest = program
        return (python if first in ("python", "python3") else first, *rest)
    import cloudpickle

    trusted.make_folder(folder)
    # The function's modules are imported from where they were found here.
    trusted.write_private(folder / "function.pkl", pickle.dumps(sys.path) + cloudpickle.dumps(program))
    return (python, "-P", "-m", "dtrain.launchers.call", str(folder))
