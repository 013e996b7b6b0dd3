"""Measurements that are too long for tests: ``make evidence``, or ``python -m dtrain.evidence [NAME ...]``.

Each name is a report: real runs of the command ``dtrain``, and what they showed, as docs/evidence/NAME.md for people
and NAME.json for figures. A figure that misses its line is printed as MISSED and the exit code is 1; the files are
written all the same. Every figure is read from the runs; the lines are those of the issue.

Functions that measure take a `Session` and run things; functions that end in ``_report`` are pure.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.checkpoint.folders import write_text_durably
from dtrain.metrics import read as read_rows
from dtrain.report import environment
from dtrain.report import summary as summaries
from dtrain.report.figures import in_bytes, in_time
from dtrain.report.summary import Summary

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
SYNCS = ("dense", "int8_ef", "diloco")
TWO_BY_TWO = ("mesh.replicate=2", "mesh.shard=2", "launcher.workers=4")
FIFTEEN_STEPS, QUALITY_STEPS = 60, 300
POLL_SECONDS = 0.05


# ---- what a report is made of --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One finished ``dtrain train``. ``command``: as typed, its temporary folder written as RUN.

    ``seconds``: wall-clock of the whole command, the start of the workers included. ``validations``: in order of steps.
    """

    command: str
    seconds: float
    printed: str
    summary: Summary
    validations: tuple[float, ...]

    @property
    def validation(self) -> float:
        return self.validations[-1]


@dataclass(frozen=True)
class Check:
    """A figure and the line that it is held to."""

    what: str
    found: str
    line: str
    met: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.found} ({self.line}): {'met' if self.met else 'MISSED'}"


@dataclass(frozen=True)
class Report:
    """``commands``: what was run, to the letter. ``figures``: plain JSON, what a plot would be made of."""

    title: str
    body: str  # Markdown
    commands: tuple[str, ...]
    checks: tuple[Check, ...]
    figures: Mapping[str, object]


@dataclass(frozen=True)
class Circumstances:
    """Where, when and with what a report was made. ``load``: processes that wanted a core in the minute before."""

    machine: str
    date: str
    revision: str
    versions: str
    load: str


def at_most(what: str, value: float, limit: float, unit: str = "") -> Check:
    """
    >>> str(at_most("seconds", 12, 10))
    'seconds: 12 (at most 10): MISSED'
    """
    return Check(what, f"{value:.4g}{unit}", f"at most {limit:g}{unit}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Check:
    """
    >>> str(at_least("ratio", 3.938, 3.9, "x"))
    'ratio: 3.938x (at least 3.9x): met'
    """
    return Check(what, f"{value:.4g}{unit}", f"at least {limit:g}{unit}", value >= limit)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right.

    >>> print(table(["sync", "loss"], [["dense", "2.1"]]))
    | sync | loss |
    |---|---:|
    | dense | 2.1 |
    """
    rule = "|".join(["", "---", *["---:"] * (len(header) - 1), ""])
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def page(report: Report, circumstances: Circumstances) -> str:
    """The whole Markdown file."""
    about = dataclasses.asdict(circumstances)
    checks = [[check.what, check.found, check.line, "met" if check.met else "**MISSED**"] for check in report.checks]
    return "\n\n".join(
        [
            f"# {report.title}",
            "Written by `make evidence`; not edited by hand.",
            report.body,
            "## Lines",
            table(["figure", "found", "line", ""], checks),
            "## Made by",
            "\n".join(f"- {name}: {value}" for name, value in about.items()),
            "```\n" + "\n".join(report.commands) + "\n```\n",
        ]
    )


# ---- the reports, from what was measured ---------------------------------------------------------------------------


def fifteen_report(runs: Mapping[tuple[str, str], Run]) -> Report:
    """Every engine with every sync, by (engine, sync)."""
    rows = [[engine, sync, *_columns(run)] for (engine, sync), run in runs.items()]
    fell = sum(run.validation < run.validations[0] for run in runs.values())
    losses = [run.validation for (_, sync), run in runs.items() if sync == "dense"]
    spread = (max(losses) - min(losses)) / min(losses) if losses else 0.0
    steps = ", ".join(sorted({f"{run.summary.steps}" for run in runs.values()}))
    body = (
        f"Each engine with each sync, {steps} steps on the default model and data, 4 workers as 2 replicas x 2 shards. "
        "Losses are in nats per token (a byte, by default). Sent: by one rank over the slow links, control messages "
        "included; beside it how many times less than dense fp32 gradients would have been.\n\n"
        + table(["engine", "sync", "loss", "validation before", "after", "sent per rank", "less than dense"], rows)
        + f"\n\nWith dense communication the validation losses of the engines differ by {spread:.1e} (relative)."
    )
    return Report(
        "Five engines, three syncs",
        body,
        tuple(run.command for run in runs.values()),
        (at_least("combinations whose validation loss fell", fell, len(runs)),),
        {f"{engine} {sync}": as_figures(run) for (engine, sync), run in runs.items()},
    )


def quality_report(dense: Run, int8_ef: Run, diloco: Run) -> Report:
    """What compression and local updates do to the loss, and what they save."""
    runs = {"dense": dense, "int8_ef": int8_ef, "diloco": diloco}
    differences = {name: run.validation / dense.validation - 1 for name, run in runs.items()}
    ratios = {name: dense.summary.sent_bytes_per_rank / run.summary.sent_bytes_per_rank for name, run in runs.items()}
    rows = [
        [name, *_columns(run)[:4], f"{100 * differences[name]:+.2f} %", f"{ratios[name]:.3f}x"]
        for name, run in runs.items()
    ]
    body = (
        f"{dense.summary.steps} steps on the default model and data with the engine {dense.summary.engine}. dense and "
        "int8_ef send gradients on the same two-phase route; the bytes are what the meter counted in the runs, their "
        "control messages included, which makes the ratio a little smaller than that of the gradients alone.\n\n"
        + table(["sync", "loss", "validation before", "after", "sent per rank", "against dense", "fewer bytes"], rows)
    )
    checks = (
        at_most("validation loss of int8_ef, off dense", 100 * abs(differences["int8_ef"]), 1, " %"),
        at_least("bytes of dense over those of int8_ef", ratios["int8_ef"], 3.9, "x"),
    )
    figures = {name: as_figures(run) for name, run in runs.items()}
    return Report(
        "Quality against bytes", body, tuple(r.command for r in runs.values()), checks, {**figures, "ratios": ratios}
    )


def default_report(run: Run) -> Report:
    """What a newcomer sees."""
    ratio = run.validation / run.validations[0]
    body = (
        f"`dtrain train` as it comes: validation loss {run.validations[0]:.4f} before, {run.validation:.4f} after "
        f"{run.summary.steps} steps; {in_time(run.seconds)} in all, of which {in_time(run.summary.seconds)} in steps. "
        f"The default data are bytes, so the loss is in nats per byte.\n\n```\n{closing_text(run)}\n```"
    )
    checks = (
        at_most("last validation loss over the first", ratio, 0.8),
        at_most("validation loss", run.validation, 2.2, " nats per byte"),
    )
    return Report("The default run", body, (run.command,), checks, as_figures(run))


def kill_report(undisturbed: Run, killed: Run, step: int) -> Report:
    """A run of which a worker died after ``step``, beside one that nobody touched."""
    runs = {"undisturbed": undisturbed, f"a worker killed after step {step}": killed}
    rows = [
        [name, f"{run.validation:.6f}", f"`{run.summary.parameters_digest}`", in_time(run.seconds)]
        for name, run in runs.items()
    ]
    told = "\n".join(line for line in killed.printed.splitlines() if "SIGKILL" in line or line.startswith("restart "))
    body = (
        f"The same command twice; in the second run one of the workers got SIGKILL at step {step} of "
        f"{killed.summary.steps}. What the command said of it:\n\n```\n{told}\n```\n\n"
        + table(["run", "validation loss", "SHA-256 of the parameters", "wall-clock"], rows)
    )
    equal = undisturbed.summary.parameters_digest == killed.summary.parameters_digest
    checks = (
        Check("restarts", f"{told.count('restart ')}", "at least 1", "restart " in told),
        Check("digests of the parameters", "equal" if equal else "different", "equal", equal),
    )
    return Report(
        "kill -9",
        body,
        (undisturbed.command, f"{killed.command}    # kill -9 of a worker at step {step}"),
        checks,
        {"undisturbed": as_figures(undisturbed), "killed": as_figures(killed), "killed_at_step": step},
    )


def suite_report(seconds: float, exit_code: int, last_line: str, cores: int) -> Report:
    """How long the tests take."""
    body = f"The whole suite on {cores} cores: {in_time(seconds)}.\n\n```\n{last_line}\n```"
    checks = (
        at_most("exit code", exit_code, 0),
        at_most("minutes", seconds / 60, 15),
    )
    figures = {"seconds": seconds, "exit_code": exit_code, "cores": cores}
    return Report("The suite", body, ("make test",), checks, figures)


def closing_text(run: Run) -> str:
    """The last lines that the command printed, from the one that names the run."""
    lines = run.printed.rstrip().splitlines()
    first = max((number for number, line in enumerate(lines) if line.startswith("run ")), default=0)
    return "\n".join(lines[first:])


def as_figures(run: Run) -> dict[str, object]:
    """A run as plain JSON."""
    kept = {**dataclasses.asdict(run.summary), "validation_losses": list(run.validations), "wall_seconds": run.seconds}
    return {name: value for name, value in kept.items() if name != "run"}


def _columns(run: Run) -> list[str]:
    """loss, first and last validation loss, bytes, times less than dense."""
    sent, dense = run.summary.sent_bytes_per_rank, run.summary.dense_bytes_per_rank
    loss = "not finite" if run.summary.loss is None else f"{run.summary.loss:.4f}"
    return [loss, f"{run.validations[0]:.4f}", f"{run.validation:.4f}", in_bytes(sent), f"{dense / sent:.2f}x"]


# ---- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """Runs commands, each in a folder of its own below ``folder``; the same command is run once."""

    folder: Path
    done: dict[tuple[str, ...], Run] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def train(self, *overrides: str) -> Run:
        """``dtrain train`` to its end. Raises ``RuntimeError`` with what it printed if it fails."""
        if overrides not in self.done:
            with self.training(*overrides) as running:
                pass
            self.done[overrides] = running.finished()
        return self.done[overrides]

    @contextmanager
    def training(self, *overrides: str) -> Iterator[Running]:
        """``dtrain train`` under way; it is waited for at the end."""
        running = Running(self.folder / f"run-{next(self.numbers)}", overrides)
        say(running.command)
        try:
            yield running
            running.process.wait()
        finally:
            if running.process.poll() is None:
                running.process.terminate()
                running.process.wait()


class Running:
    """``dtrain train`` in a process of its own, what it prints in a file."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.printed = folder, folder / "printed.txt"
        self.command = shlex.join(["dtrain", "train", *overrides, "run.dir=RUN"])
        program = [str(Path(sys.executable).with_name("dtrain")), "train", *overrides, f"run.dir={folder}"]
        self.started = time.monotonic()
        with self.printed.open("w") as out:
            self.process = subprocess.Popen(program, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def finished(self) -> Run:
        """The run, which has ended."""
        seconds, printed = time.monotonic() - self.started, self.printed.read_text()
        if self.process.returncode:
            raise RuntimeError(f"{self.command} ended with exit code {self.process.returncode}:\n{printed[-4000:]}")
        rows = read_rows(self.folder / "metrics.jsonl")
        validations = tuple(float(row["validation_loss"] or "nan") for row in rows if "validation_loss" in row)
        run = Run(self.command, seconds, printed, summaries.read(self.folder / "summary.json"), validations)
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
        return [pid for pid, parent, command in processes() if parent == self.process.pid and "dtrain.worker" in command]


def processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent's pid, command line) of every process that may be looked at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended meanwhile
            continue


def fifteen(session: Session) -> Report:
    """Every engine with every sync."""
    steps = f"train.steps={FIFTEEN_STEPS}"
    runs = {
        (engine, sync): session.train(f"engine={engine}", f"sync={sync}", steps, *TWO_BY_TWO)
        for engine in ENGINES
        for sync in SYNCS
    }
    return fifteen_report(runs)


def quality(session: Session) -> Report:
    """Validation loss against bytes."""
    dense, int8_ef, diloco = (session.train(f"sync={sync}", f"train.steps={QUALITY_STEPS}") for sync in SYNCS)
    return quality_report(dense, int8_ef, diloco)


def default(session: Session) -> Report:
    """``dtrain train`` as it comes."""
    return default_report(session.train())


def kill(session: Session) -> Report:
    """The default run, undisturbed and with a worker killed in the middle."""
    undisturbed = session.train()
    with session.training() as running:
        step = running.wait_for_step(undisturbed.summary.steps // 2)
        victim = running.workers()[-1]
        say(f"    kill -9 of worker {victim} at step {step}")
        os.kill(victim, signal.SIGKILL)
    return kill_report(undisturbed, running.finished(), step)


def suite(session: Session) -> Report:
    """The wall-clock of ``make test``."""
    say("make test")
    started = time.monotonic()
    done = subprocess.run(["make", "test"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.rstrip().splitlines() or [""]
    return suite_report(time.monotonic() - started, done.returncode, lines[-1], os.cpu_count() or 1)


REPORTS: dict[str, Callable[[Session], Report]] = {
    "fifteen": fifteen, "quality": quality, "default": default, "kill": kill, "suite": suite,
}  # fmt: skip
LATER = ("suite",)  # only when it is named


# ---- the command ---------------------------------------------------------------------------------------------------


def circumstances() -> Circumstances:
    """Of this moment, on this machine."""
    found = environment.record()
    cpu = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model n")]
    git, versions = found["git"], found["versions"]
    revision = "none: not a git repository"
    if isinstance(git, dict):
        revision = f"{git['revision']}{', with changes that are not committed' if git['dirty'] else ''}"
    assert isinstance(versions, dict)
    return Circumstances(
        machine=f"{found['cpu_count']} cores ({cpu[0] if cpu else 'unknown'}), {found['platform']}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        revision=revision,
        versions=", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions),
        load=f"{os.getloadavg()[0]:.1f} at the start",
    )


def write(name: str, report: Report, made: Circumstances, folder: Path) -> None:
    """Both files of a report; each is whole or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = [dataclasses.asdict(check) for check in report.checks]
    content = {"made": dataclasses.asdict(made), "checks": checks, "figures": dict(report.figures)}
    write_text_durably(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text_durably(folder / f"{name}.md", page(report, made))
    say(f"{folder / name}.md")
    for check in report.checks:
        say(f"    {check}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the named reports; returns the exit code: 0 if every line is met, 1 if one is missed or a run failed."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.evidence", description="Measure, into docs/evidence/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(REPORTS)}; all but {LATER[0]} by default")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"), help="the folder (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in REPORTS]
    if unknown:
        parser.error(f"there is no report {unknown[0]} (there are {', '.join(REPORTS)})")
    missed = False
    with tempfile.TemporaryDirectory(prefix="dtrain-evidence-") as folder:
        session = Session(Path(folder))
        for name in chosen.names or [name for name in REPORTS if name not in LATER]:
            made = circumstances()
            try:
                report = REPORTS[name](session)
            except RuntimeError as error:
                say(f"{name}: MISSED, as a run failed: {error}")
                missed = True
                continue
            write(name, report, made, chosen.out)
            missed = missed or not all(check.met for check in report.checks)
    return int(missed)


def say(text: str) -> None:
    """A line of what is being done, at once."""
    print(text, flush=True)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
