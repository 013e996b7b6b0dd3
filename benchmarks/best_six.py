"""The six best of every sync: tuned alike over five seeds, and at equal time on a slow link.

    chosen      of the rows of `all_syncs` that send at least `LEAST` times fewer bytes than fp32 data parallelism, the
                six with the lowest loss, whichever optimizer is inside
    tuned       as the rows of `few_bytes`: as many runs, the same seeds and validation windows
    equal time  each for as long as data parallelism in bf16 takes for `TIMED_STEPS` steps, on four hosts

Functions that end in ``_report`` are pure.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.few_bytes import (
    ADAMW,
    COMMON,
    FIXED,
    MUON,
    ONE_SEED,
    RATES,
    SEEDS,
    STEPS,
    TUNING,
    Tried,
    Words,
    at_defaults,
    best,
    cell,
    lr,
    measured_syncs,
    outer,
    paired,
    sent,
    tuned,
    tuned_row,
    tuning_table,
)  # fmt: skip
from benchmarks.harness import Run, Session, as_figures
from benchmarks.page import Report, table
from dtrain.report.figures import in_bytes, in_time
from dtrain.slurm.devcluster import devcluster
from tests.programs.hosts import CLUSTER

NUMBER, LEAST = 6, 10
OTHERWISE: Mapping[str, Words] = {
    **dict.fromkeys(("diloco", "streaming_diloco", "delayed_diloco", "eager_diloco"), outer(0.8, 0.6)),
    "muloco": outer(1.0, 0.5),
    "slowmo": ("sync.momentum=0.3",),
    "co2": ("sync.gap=none",),
}
"""What else is tried of a sync that has more to tune than the learning rate of its inner optimizer."""
HOSTS = ("launcher=slurm", "launcher.nodes=4", "launcher.workers=4", "launcher.wait=true")
RATE, TIMED_STEPS, PILOT_STEPS = "10mbit", 200, 60

Key = tuple[str, str]
"""A sync and its inner optimizer."""


@dataclass(frozen=True)
class Tuning:
    """Of the chosen six: by name, the words that are fixed, the losses of every trial, and the candidate that won."""

    fixed: Mapping[str, Words]
    trials: Mapping[str, Tried]
    chosen: Mapping[str, Words]

    def words(self, name: str) -> Words:
        return *self.fixed[name], *self.chosen[name]


def best_six(session: Session) -> Report:
    """The six best, each at the best of its candidates, over five seeds; beside both data parallelisms."""
    tuning, baselines = tuned_six(session), tuned(session)[1]
    settings = {base: (*FIXED[base], *baselines[base]) for base in (ADAMW, MUON)}
    settings.update({name: tuning.words(name) for name in tuning.fixed})
    runs = {name: [cell(session, words, seed, "reported") for seed in SEEDS] for name, words in settings.items()}
    return best_six_report(tuning, runs)


def equal_time(session: Session) -> Report:
    """The six best over links of `RATE`, as tuned, each in the time that data parallelism in bf16 takes."""
    tuning, baselines = tuned_six(session), tuned(session)[1]
    with devcluster(nodes=4, bandwidth=RATE, name=CLUSTER):
        base = _on_hosts(session, (*BF16, *baselines[ADAMW]), TIMED_STEPS)
        runs = {}
        for name in tuning.fixed:
            pilot = _on_hosts(session, tuning.words(name), PILOT_STEPS).summary
            runs[name] = _on_hosts(session, tuning.words(name), int(base.summary.seconds * pilot.steps / pilot.seconds))
    return equal_time_report(base, runs)


BF16 = ("optim=adamw", "sync=every_step", "compress=bf16")


def six(runs: Mapping[Key, Run]) -> list[Key]:
    """The rows that are tuned."""
    few = {key: run for key, run in runs.items() if _less(run) >= LEAST}
    return sorted(few, key=lambda key: few[key].validation)[:NUMBER]


def candidates(name: str) -> list[Words]:
    """As many for every sync: four learning rates, or two and another setting of what else there is to tune."""
    if name in OTHERWISE:
        return [(lr(rate), *words) for words in ((), OTHERWISE[name]) for rate in RATES[1:3]]
    return [(lr(rate),) for rate in RATES]


def tuned_six(session: Session) -> Tuning:
    """Those that were chosen, tuned."""
    keys = {f"{name}, {inside} inside": (name, inside) for name, inside in six(measured_syncs(session))}
    fixed = {shown: at_defaults(*key) for shown, key in keys.items()}
    trials = {shown: tuned_row(session, fixed[shown], candidates(key[0])) for shown, key in keys.items()}
    return Tuning(fixed, trials, {shown: best(tried) for shown, tried in trials.items()})


def best_six_report(tuning: Tuning, runs: Mapping[str, Sequence[Run]]) -> Report:
    """``runs``: by row, one for each of `SEEDS`; the baselines first."""
    rows = []
    for name, by_seed in runs.items():
        losses = [run.validation for run in by_seed]
        exposed = statistics.median(run.summary.exposed_fraction or 0 for run in by_seed)
        rows.append([name, f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}",
                     *(paired(by_seed, runs[base]) for base in (ADAMW, MUON)), *sent(by_seed[0]),
                     f"{exposed:.0%}"])  # fmt: skip
    body = (
        f"Of [every sync](all_syncs.md) at its defaults, the {NUMBER} with the lowest loss among those that send at "
        f"least {LEAST} times fewer bytes than data parallelism in fp32. {STEPS} steps on the default text and model, "
        "DDP, four replicas, equal batches: equal tokens. Losses in nats per byte over 1,024 validation windows; mean "
        f"and standard deviation over seeds {SEEDS[0]} to {SEEDS[-1]}; against tuned data parallelism, of the "
        "differences seed by seed. Exposed: the share of the time in which training stood still for communication, "
        "over the loopback of one machine.\n\n"
        + table(["", "loss", "AdamW DP", "Muon DP", "sent per rank", "less", "exposed"], rows)
        + f"\n\n**Tuning.** As for the [baselines](few_bytes.md): four candidates with seed {TUNING[0]}, the two best "
        f"with seed {TUNING[1]} too, on other validation windows.\n\n" + tuning_table(tuning.trials, tuning.chosen)
    )
    kept = {f"{name}, seed {seed}": run for name, by in runs.items() for seed, run in zip(SEEDS, by, strict=True)}
    figures: dict[str, object] = {name: as_figures(run) for name, run in kept.items()}
    figures["tuning"] = {
        n: {" ".join(words): losses for words, losses in its.items()} for n, its in tuning.trials.items()
    }
    return Report("The six best syncs", body, tuple(run.command for run in kept.values()), (), figures)


def equal_time_report(base: Run, runs: Mapping[str, Run]) -> Report:
    """``base``: data parallelism in bf16. ``runs``: by row."""
    everything = {"AdamW data parallelism, bf16": base, **runs}
    rows = [
        [name, f"{run.summary.steps:,}", in_time(run.summary.seconds), f"{run.validation:.4f}",
         f"{run.validation / base.validation - 1:+.1%}", in_bytes(run.summary.sent_bytes_per_rank)]
        for name, run in everything.items()
    ]  # fmt: skip
    body = (
        f"[The six best syncs](best_six.md), as tuned there, on four hosts of `dtrain cluster` with links of {RATE}, "
        "which share two cores: each trains for as many steps as fit into the time that data parallelism in bf16 takes "
        f"for {base.summary.steps}, judged by a run of {PILOT_STEPS} steps of its own; its schedule ends with the last "
        f"of them. Seed {ONE_SEED}; time in steps, without the start of the job.\n\n"
        + table(["", "steps", "time", "loss", "against bf16", "sent per rank"], rows)
    )
    figures = {name: as_figures(run) for name, run in everything.items()}
    return Report("At equal time", body, tuple(run.command for run in everything.values()), (), figures)


def _on_hosts(session: Session, words: Words, steps: int) -> Run:
    """On the cluster that is up."""
    settings = (*COMMON, "data.part=reported", *words, f"train.seed={ONE_SEED}")
    return session.cell(*settings, *HOSTS, f"train.steps={steps}", over=RATE)


def _less(run: Run) -> float:
    return run.summary.dense_bytes_per_rank / run.summary.sent_bytes_per_rank
