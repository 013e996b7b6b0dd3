"""The report on what local updates cost in loss, at equal tokens. Functions that end in ``_report`` are pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.compression import BASE_RATE, FOUR_REPLICAS, LESS_NOISE
from benchmarks.harness import Run, Session, as_figures
from benchmarks.page import Report, at_most, table
from dtrain.report.figures import in_bytes

STEPS, EVERY, SEEDS, FACTORS = 1000, 25, (1, 2, 3, 4, 5), (0.5, 1.0, 2.0)
WARMUP = 250
"""As much of the run as DiLoCo's paper trains with data parallelism first: 24,000 of 88,000 steps."""
SHORT = (f"sync.every_steps={EVERY}", f"sync.warmup_steps={WARMUP}", "sync.outer.lr=0.9", "sync.outer.momentum=0.6")
METHODS = {
    "data parallelism": ("sync=dense",),
    "DiLoCo": ("sync=diloco", *SHORT, "compress=none"),
    "Streaming DiLoCo, E3M0": ("sync=streaming_diloco", *SHORT),
}
OTHERWISE = {
    "DiLoCo without warm-up, outer 0.7 / 0.9": (
        "sync=diloco", f"sync.every_steps={EVERY}", "compress=none",
    ),
    "DiLoCo without warm-up, outer 0.7 / 0.5": (
        "sync=diloco", f"sync.every_steps={EVERY}", "sync.outer.momentum=0.5", "compress=none",
    ),
    "DiLoCo, outer 0.7 / 0.5": (
        "sync=diloco", f"sync.every_steps={EVERY}", f"sync.warmup_steps={WARMUP}", "sync.outer.momentum=0.5",
        "compress=none",
    ),
    "DiLoCo, outer 0.7 / 0.9, the paper's": (
        "sync=diloco", f"sync.every_steps={EVERY}", f"sync.warmup_steps={WARMUP}", "compress=none",
    ),
    "DiLoCo, 8 bits, rounds of 50": (
        "sync=diloco", "sync.every_steps=50", *SHORT[1:], "compress=int8",
    ),
    "Streaming DiLoCo, E3M0, outer 0.4 / 0.9, the paper's": (
        "sync=streaming_diloco", f"sync.every_steps={EVERY}", f"sync.warmup_steps={WARMUP}",
    ),
    "CO2 without warm-up, 8 bits, rounds of 12": ("sync=co2", "sync.every_steps=12", "compress=int8"),
    "CO2 as well, without its penalty": (
        "sync=co2", "sync.every_steps=12", "sync.gap=none", "compress=int8",
    ),
    "CO2 as well, outer lr 0.5": (
        "sync=co2", "sync.every_steps=12", "sync.lr=0.5", "compress=int8",
    ),
}  # fmt: skip
"""From the first step on, with other outer steps, or otherwise; one seed."""
LINES = {"DiLoCo": ("data parallelism", 3.0), "Streaming DiLoCo, E3M0": ("DiLoCo", 2.0)}


def equal_tokens(session: Session) -> Report:
    """Each method at three learning rates with one seed, then at its best one with the other seeds."""
    swept = {(name, f): _cell(session, method, f, SEEDS[0]) for name, method in METHODS.items() for f in FACTORS}
    best = _best(swept)
    repeated = {name: [swept[name, best[name]], *(_cell(session, METHODS[name], best[name], s) for s in SEEDS[1:])]
                for name in METHODS}  # fmt: skip
    scratch = {name: _cell(session, method, 1.0, SEEDS[0]) for name, method in OTHERWISE.items()}
    return equal_tokens_report(swept, repeated, scratch)


def equal_tokens_report(
    swept: Mapping[tuple[str, float], Run], repeated: Mapping[str, list[Run]], scratch: Mapping[str, Run]
) -> Report:
    """``swept``: by method and factor of the learning rate, one seed. ``repeated``: by method, at its best one, all
    seeds. ``scratch``: without warm-up, one seed.
    """
    best = _best(swept)
    factors = list(dict.fromkeys(factor for _, factor in swept))
    means = {name: statistics.mean(run.validation for run in runs) for name, runs in repeated.items()}
    dense = means["data parallelism"]
    rows = []
    for name, runs in repeated.items():
        at_rates = [f"{swept[name, factor].validation:.4f}" for factor in factors]
        spread = statistics.stdev(run.validation for run in runs)
        rows.append([name, *at_rates, f"{best[name]:g}", f"{means[name]:.4f} ± {spread:.4f}",
                     f"{means[name] / dense - 1:+.2%}", *_bytes(runs[0])])  # fmt: skip
    same_seed = repeated["data parallelism"][0].validation
    for name, run in scratch.items():
        rows.append([name, *("-" for _ in factors), "1", f"{run.validation:.4f}, one seed",
                     f"{run.validation / same_seed - 1:+.2%}", *_bytes(run)])  # fmt: skip
    checks = []
    for name, (other, line) in LINES.items():
        off = 100 * (means[name] / means[other] - 1)
        checks.append(at_most(f"mean validation loss of {name}, above that of {other}", off, line, " %"))
    summary = repeated["DiLoCo"][0].summary
    body = (
        f"{summary.steps} steps on the default text and model, DDP, {summary.replicas} replicas, rounds of {EVERY} "
        "steps, equal batches: equal tokens. Each method at three learning rates of the inner AdamW (factors of the "
        f"default one) with one seed, then at its best one with {len(SEEDS)} seeds: mean and standard deviation. "
        f"DiLoCo and Streaming DiLoCo begin after {WARMUP} steps of data parallelism, a quarter of the run as in "
        "DiLoCo's paper, whose bytes count. Outside they take Nesterov 0.9 / 0.6, found on the first seed "
        "and on the validation examples of this page, where data parallelism is tuned in its learning rate alone; "
        "below, how it ends otherwise, on the first seed and off that of data parallelism. "
        f"Losses in nats per byte, of {LESS_NOISE[1].partition('=')[2]} examples.\n\n"
        + table(
            ["", *(f"lr x {factor:g}" for factor in factors), "best lr", "loss", "off", "sent per rank", "less"], rows
        )
    )
    kept = {f"{name}, lr x {factor:g}": run for (name, factor), run in swept.items()} | dict(scratch)
    for name, runs_of_seeds in repeated.items():
        kept.update({f"{name}, seed {seed}": run for seed, run in zip(SEEDS, runs_of_seeds, strict=True)})
    commands = tuple(dict.fromkeys(run.command for run in kept.values()))
    figures = {name: as_figures(run) for name, run in kept.items()}
    return Report("Local updates at equal tokens", body, commands, tuple(checks), figures)


def _bytes(run: Run) -> list[str]:
    """What was sent, and how much less than data parallelism sends."""
    sent, dense = run.summary.sent_bytes_per_rank, run.summary.dense_bytes_per_rank
    return [in_bytes(sent), f"{dense / sent:.1f}x"]


def _cell(session: Session, method: tuple[str, ...], factor: float, seed: int) -> Run:
    chosen = (*FOUR_REPLICAS, f"train.steps={STEPS}", *LESS_NOISE, *method)
    return session.cell(*chosen, f"optim.inner.lr={BASE_RATE * factor:g}", f"train.seed={seed}")


def _best(swept: Mapping[tuple[str, float], Run]) -> dict[str, float]:
    """The factor with the lowest loss, by method."""
    best: dict[str, float] = {}
    for name, factor in swept:
        if name not in best or swept[name, factor].validation < swept[name, best[name]].validation:
            best[name] = factor
    return best
