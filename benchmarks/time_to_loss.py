"""How long until the loss at which AdamW data parallelism ends, on links of several rates; and a larger model.

    target   the loss at which data parallelism in bf16 with AdamW ends, after `STEPS` steps
    length   of every other row: the shortest of its `LENGTHS` that ends at or below the target, found on this machine
             with a tuning seed and its validation windows; then the row is run on hosts, with a reported seed

Functions that end in ``_report`` are pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.best_six import BF16, HOSTS
from benchmarks.few_bytes import (
    ADAMW,
    COMMON,
    FIXED,
    MUON,
    ONE_SEED,
    SEEDS,
    STEPS,
    TUNING,
    Words,
    settings,
    tuned,
)  # fmt: skip
from benchmarks.harness import Run, Session, as_figures
from benchmarks.page import Check, Report, at_least, table
from dtrain.report.figures import in_bytes, in_time
from dtrain.slurm.devcluster import devcluster
from tests.programs.hosts import CLUSTER

BASE, LOW_RANK = "AdamW data parallelism, bf16", "AdamW data parallelism, PowerSGD"
ROWS = ("MuLoCo, 100x", "MuLoCo, 400x")
LENGTHS: Mapping[str, tuple[int, ...]] = {
    LOW_RANK: (1000, 1200, 1500, 2000), **dict.fromkeys(ROWS, (400, 500, 600, 800)),
}  # fmt: skip
LINKS, HELD, SOONER = ("10mbit", "100mbit"), "10mbit", 10
SMALL_STEPS = 200


@dataclass(frozen=True)
class Reached:
    """``runs``: by length, until one ended at or below the target. ``steps``: of that one; 0: none did."""

    runs: Mapping[int, Run]
    steps: int


def time_to_loss(session: Session) -> Report:
    """Of data parallelism in bf16 and by PowerSGD, and of MuLoCo."""
    words = _words(session)
    target = _tried(session, words[BASE], STEPS).validation
    lengths = {name: _shortest(session, words[name], lengths, target) for name, lengths in LENGTHS.items()}
    steps = {BASE: STEPS, **{name: reached.steps for name, reached in lengths.items() if reached.steps}}
    runs = {}
    for rate in LINKS:
        with devcluster(nodes=4, bandwidth=rate, name=CLUSTER):
            for name, number in steps.items():
                chosen = (*with_steps(words[name], number), f"train.seed={SEEDS[0]}", *HOSTS)
                runs[rate, name] = session.cell(*COMMON, "data.part=reported", *chosen, over=rate)
    return time_to_loss_report(target, lengths, runs)


def small_model(session: Session) -> Report:
    """The model `small`: both data parallelisms and the best two rows of MuLoCo, tuned on the default model."""
    chosen = tuned(session)[1]
    words = {name: (*FIXED[name], *chosen[name]) for name in (ADAMW, MUON, *ROWS)}
    runs = {
        name: session.cell(
            *COMMON, "data.part=reported", "model=small", *with_steps(row, SMALL_STEPS), f"train.seed={ONE_SEED}"
        )
        for name, row in words.items()
    }
    return small_model_report(runs)


def with_steps(words: Words, steps: int) -> Words:
    """A run of that length, with as many rounds for each step.

    >>> with_steps(("sync=muloco", "sync.every_steps={_target_:X,steps:1000,rounds:148,power:2}"), 500)
    ('sync=muloco', 'sync.every_steps={_target_:X,steps:500,rounds:74,power:2}', 'train.steps=500')
    """

    def shorter(cadence: re.Match[str]) -> str:
        return f"steps:{steps},rounds:{round(int(cadence[2]) * steps / int(cadence[1]))}"

    return *(re.sub(r"steps:(\d+),rounds:(\d+)", shorter, word) for word in words), f"train.steps={steps}"


def time_to_loss_report(target: float, lengths: Mapping[str, Reached], runs: Mapping[tuple[str, str], Run]) -> Report:
    """``lengths``: by row, found at the loss ``target``. ``runs``: by rate and row."""
    rows, checks = [], []
    for rate in dict.fromkeys(rate for rate, _ in runs):
        seconds = {name: run.summary.seconds for (its, name), run in runs.items() if its == rate}
        known = min(seconds[name] for name in (BASE, LOW_RANK) if name in seconds)
        ours = [name for name in ROWS if name in seconds]
        for name in seconds:
            run = runs[rate, name]
            rows.append([rate, name, f"{run.summary.steps:,}", f"{run.validation:.4f}", in_time(seconds[name]),
                         f"{known / seconds[name]:.1f}x", in_bytes(run.summary.sent_bytes_per_rank)])  # fmt: skip
        if rate == HELD:
            what = f"{rate}: the best row sooner than the faster of bf16 and PowerSGD"
            best = max((known / seconds[name] for name in ours), default=0.0)
            checks.append(at_least(what, best, SOONER, "x"))
    missed = [name for name, reached in lengths.items() if not reached.steps]
    never = "none" if not missed else ", ".join(missed)
    checks.append(Check("rows that did not reach the loss in the longest of their runs", never, "none", not missed))
    tried = [
        [name, f"{steps:,}", f"{run.validation:.4f}", "chosen" if steps == reached.steps else ""]
        for name, reached in lengths.items() for steps, run in reached.runs.items()
    ]  # fmt: skip
    body = (
        "The default text and model, DDP, four replicas on four hosts of `dtrain cluster`, which share two cores, so "
        "that computing takes longer than on machines of their own, and a slow link counts for less. Time in steps, "
        "without the start of the job and without evaluation, until the end of a run that is as long as it must be. "
        f"Seed {SEEDS[0]}.\n\n"
        + table(["links", "", "steps", "loss at the end", "time", "sooner", "sent per rank"], rows)
        + f"\n\nSooner: than the faster of data parallelism in bf16 and PowerSGD.\n\n**How long a run must be.** "
        f"Data parallelism in bf16 ends at {target:.4f} after {STEPS:,} steps (seed {TUNING[0]}, the tuning windows of "
        "[the baselines](few_bytes.md)). Of the others, from the shortest on, until one ends there:\n\n"
        + table(["", "steps", "loss", ""], tried)
    )
    figures: dict[str, object] = {f"{rate}, {name}": as_figures(run) for (rate, name), run in runs.items()}
    figures["lengths"] = {
        name: {str(steps): run.validation for steps, run in its.runs.items()} for name, its in lengths.items()
    }
    commands = tuple(run.command for run in runs.values())
    return Report("Time to a loss", body, commands, tuple(checks), figures)


def small_model_report(runs: Mapping[str, Run]) -> Report:
    """``runs``: by row."""
    base = runs[ADAMW]
    rows = [
        [name, f"{run.validation:.4f}", f"{run.validation / base.validation - 1:+.2%}",
         in_bytes(run.summary.sent_bytes_per_rank),
         f"{run.summary.dense_bytes_per_rank / run.summary.sent_bytes_per_rank:,.0f}x"]
        for name, run in runs.items()
    ]  # fmt: skip
    order = " < ".join(sorted(runs, key=lambda name: runs[name].validation))
    body = (
        f"The model `small` of 11 million parameters, {SMALL_STEPS} steps on the default text, DDP, four replicas, "
        f"seed {ONE_SEED}; settings as tuned on the [default model](few_bytes.md), rounds shortened with the run. One "
        "seed: differences of a percent are noise.\n\n"
        + table(["", "loss", "AdamW DP", "sent per rank", "less"], rows)
        + f"\n\nBy loss: {order}."
    )
    figures = {name: as_figures(run) for name, run in runs.items()}
    return Report("A larger model", body, tuple(run.command for run in runs.values()), (), figures)


def _words(session: Session) -> dict[str, Words]:
    """What every row is, as tuned."""
    chosen = tuned(session)[1]
    low_rank = ("optim=adamw", "sync=every_step", "compress=powersgd16_ef", *chosen[ADAMW])
    rows = {name: settings(chosen)[name] for name in ROWS}
    return {BASE: (*BF16, *chosen[ADAMW]), LOW_RANK: low_rank, **rows}


def _shortest(session: Session, words: Words, lengths: tuple[int, ...], target: float) -> Reached:
    runs: dict[int, Run] = {}
    for steps in lengths:
        runs[steps] = _tried(session, words, steps)
        if runs[steps].validation <= target:
            return Reached(runs, steps)
    return Reached(runs, 0)


def _tried(session: Session, words: Words, steps: int) -> Run:
    return session.cell(*COMMON, "data.part=tuning", *with_steps(words, steps), f"train.seed={TUNING[0]}")
