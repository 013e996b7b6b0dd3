"""Runs of the command ``dtrain train``: started, watched, killed in part, and read."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.report import summary as summaries
from dtrain.report.figures import in_time
from dtrain.report.summary import Summary
from dtrain.slurm.devcluster import login_command
from dtrain.train.checkpoint.folders import step_name, write_text_durably
from dtrain.train.metrics import read as read_rows
from tests.programs.hosts import CLUSTER, environment

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One finished ``dtrain train``. ``command``: as typed, its temporary folder written as RUN.

    ``seconds``: wall-clock of the whole command, the start of the workers included. ``validations``: in order of steps.
    ``revision``: of the code that ran.
    """

    command: str
    seconds: float
    printed: str
    summary: Summary
    validations: tuple[float, ...]
    revision: str = ""

    @property
    def validation(self) -> float:
        return self.validations[-1]

    def write(self, path: Path) -> None:
        """As JSON; the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_durably(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Run:
        """Undo `write`."""
        kept = json.loads(path.read_text())
        return cls(**{**kept, "summary": Summary(**kept["summary"]), "validations": tuple(kept["validations"])})


@dataclass
class Session:
    """Runs commands, each in a folder of its own below ``folder``; the same command is run once.

    ``kept``: where `cell` keeps what it has run, so that a sweep that was cut off goes on where it was. ``made``: what
    this session has put there. ``reused``: what it has found there. ``revision``: of the code that runs.
    """

    folder: Path
    kept: Path
    done: dict[tuple[str, ...], Run] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    made: set[Path] = field(default_factory=set)
    reused: set[Path] = field(default_factory=set)
    revision: str = ""

    def begin(self, revision: str) -> None:
        """A report, on the code of ``revision``. What other code has run is not taken for its own."""
        if revision != self.revision:
            self.done.clear()
            self.made.clear()
        self.revision = revision
        self.reused.clear()

    def kept_runs(self) -> dict[str, int]:
        """How many runs of this report were found, by the revision that made them."""
        return dict(Counter(json.loads(path.read_text())["revision"] for path in sorted(self.reused)))

    def cell(self, *overrides: str, over: str = "") -> Run:
        """`train`, unless ``kept`` has this run already. ``over``: as of `Running`."""
        path = self._path((*overrides, f"over {over}") if over else overrides)
        if not self.has(path):
            self.train(*overrides, over=over).write(path)
        return Run.read(path)

    def resumed_cell(self, step: int, *overrides: str) -> tuple[Run, Run]:
        """`cell`, and the same run gone on with from its checkpoint of ``step``."""
        path = self._path((*overrides, f"resumed at {step}"))
        if not self.has(path, self._path(overrides)):
            every = (f"train.checkpoint_every_steps={step}", "train.keep_checkpoints=100")
            with self.training(*overrides, *every) as whole:
                pass
            whole.finished().write(self._path(overrides))
            start = f"run.resume={whole.folder / 'checkpoints' / step_name(step)}"
            with self.training(*overrides, *every, start) as resumed:
                pass
            resumed.finished().write(path)
            shutil.rmtree(whole.folder)
            shutil.rmtree(resumed.folder)
        return Run.read(self._path(overrides)), Run.read(path)

    def has(self, *paths: Path) -> bool:
        """Whether all of them are kept, with the revision that made them; if not, they are about to be made."""
        has = all(path.exists() and "revision" in json.loads(path.read_text()) for path in paths)
        (self.reused if has else self.made).update(set(paths) - self.made)
        return has

    def _path(self, key: Sequence[str]) -> Path:
        return self.kept / f"{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:24]}.json"

    def train(self, *overrides: str, over: str = "") -> Run:
        """``dtrain train`` to its end. Raises ``RuntimeError`` with what it printed if it fails."""
        key = (*overrides, over)
        if key not in self.done:
            with self.training(*overrides, over=over) as running:
                pass
            self.done[key] = running.finished()
        return self.done[key]

    @contextmanager
    def training(self, *overrides: str, over: str = "") -> Iterator[Running]:
        """``dtrain train`` under way; it is waited for at the end."""
        running = Running(self.folder / f"run-{next(self.numbers)}", overrides, self.revision, over)
        say(running.command)
        try:
            yield running
            running.process.wait()
        finally:
            if running.process.poll() is None:
                running.process.terminate()
                running.process.wait()


class Running:
    """``dtrain train`` in a process of its own, what it prints in a file.

    ``over``: the bandwidth of the links of cluster `CLUSTER`, on whose login host the command runs; "": it runs here.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], revision: str = "", over: str = "") -> None:
        folder.mkdir(parents=True)
        self.revision = revision
        self.folder, self.printed = folder, folder / "printed.txt"
        self.command = shlex.join(["dtrain", "train", *overrides, "run.dir=RUN"])
        program = [str(Path(sys.executable).with_name("dtrain")), "train", *overrides, f"run.dir={folder}"]
        variables = dict(os.environ)
        if over:
            program, own = login_command(program, CLUSTER)
            variables = {**environment(CLUSTER), **own}
        self.started = time.monotonic()
        with self.printed.open("w") as out:
            self.process = subprocess.Popen(
                program, env=variables, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def finished(self) -> Run:
        """The run, which has ended."""
        seconds, printed = time.monotonic() - self.started, self.printed.read_text()
        if self.process.returncode:
            raise RuntimeError(f"{self.command} ended with exit code {self.process.returncode}:\n{printed[-4000:]}")
        rows = read_rows(self.folder / "metrics.jsonl")
        losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
        validations = tuple(math.nan if loss is None else float(loss) for loss in losses)
        summary = summaries.read(self.folder / "summary.json")
        run = Run(self.command, seconds, printed, summary, validations, self.revision)
        say(f"    validation loss {run.validations[0]:.4f} -> {run.validation:.4f}, {in_time(seconds)}")
        return run

    def wait_for_step(self, step: int) -> int:
        """Wait until a step not before ``step`` is in the metrics; returns it. Raises if the run ends before."""
        while self.process.poll() is None:
            metrics = self.folder / "metrics.jsonl"
            steps = [int(row["step"] or 0) for row in read_rows(metrics) if "loss" in row]
            if steps and steps[-1] >= step:
                return steps[-1]
            time.sleep(POLL_SECONDS)
        raise RuntimeError(f"{self.command} ended before step {step}:\n{self.printed.read_text()[-4000:]}")

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        return [
            pid
            for pid, parent, command in processes()
            if parent == self.process.pid and "dtrain.train.worker" in command
        ]


def as_figures(run: Run) -> dict[str, object]:
    """A run as plain JSON."""
    validations = [loss if math.isfinite(loss) else None for loss in run.validations]
    kept = {
        **dataclasses.asdict(run.summary), "validation_losses": validations, "wall_seconds": run.seconds,
        "revision": run.revision,
    }  # fmt: skip
    return {name: value for name, value in kept.items() if name != "run"}


def processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent's pid, command line) of every process that may be looked at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended meanwhile
            continue


def say(text: str) -> None:
    """A line of what is being done, at once."""
    print(text, flush=True)
