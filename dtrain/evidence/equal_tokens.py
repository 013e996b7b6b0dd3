"""The report on what local updates cost in loss, at equal tokens. Functions that end in ``_report`` are pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from dtrain.evidence.compression import BASE_RATE, FOUR_REPLICAS, LESS_NOISE
from dtrain.evidence.page import Report, at_most, table
from dtrain.evidence.runs import Run, Session, as_figures
from dtrain.report.figures import in_bytes

STEPS, EVERY, SEEDS, FACTORS = 1000, 25, (1, 2, 3, 4, 5), (0.5, 1.0, 2.0)
METHODS = {
    "data parallelism": ("sync=dense",),
    "DiLoCo": ("sync=diloco", f"sync.every_steps={EVERY}", "compress@sync.compress=none"),
    "Streaming DiLoCo, E3M0": ("sync=streaming_diloco", f"sync.every_steps={EVERY}"),
}
LINES = {"DiLoCo": ("data parallelism", 3.0), "Streaming DiLoCo, E3M0": ("DiLoCo", 2.0)}


def equal_tokens(session: Session) -> Report:
    """Each method at three learning rates with one seed, then at its best one with the other seeds."""
    swept = {(name, factor): _cell(session, name, factor, SEEDS[0]) for name in METHODS for factor in FACTORS}
    best = _best(swept)
    repeated = {name: [swept[name, best[name]], *(_cell(session, name, best[name], seed) for seed in SEEDS[1:])]
                for name in METHODS}  # fmt: skip
    return equal_tokens_report(swept, repeated)


def equal_tokens_report(swept: Mapping[tuple[str, float], Run], repeated: Mapping[str, list[Run]]) -> Report:
    """``swept``: by method and factor of the learning rate, one seed. ``repeated``: by method, at its best one, all
    seeds.
    """
    best = _best(swept)
    factors = list(dict.fromkeys(factor for _, factor in swept))
    means = {name: statistics.mean(run.validation for run in runs) for name, runs in repeated.items()}
    rows, checks = [], []
    for name, runs in repeated.items():
        losses = [run.validation for run in runs]
        summary = runs[0].summary
        rows.append([
            name, *(f"{swept[name, factor].validation:.4f}" for factor in factors), f"{best[name]:g}",
            f"{means[name]:.4f} ± {statistics.stdev(losses):.4f}",
            f"{means[name] / means['data parallelism'] - 1:+.2%}",
            in_bytes(summary.sent_bytes_per_rank),
            f"{summary.dense_bytes_per_rank / summary.sent_bytes_per_rank:.0f}x",
        ])  # fmt: skip
    for name, (other, line) in LINES.items():
        off = 100 * (means[name] / means[other] - 1)
        checks.append(at_most(f"mean validation loss of {name}, above that of {other}", off, line, " %"))
    summary = repeated["DiLoCo"][0].summary
    body = (
        f"{summary.steps} steps on the default text and model, DDP, {summary.replicas} replicas, rounds of {EVERY} "
        "steps, equal batches: equal tokens. Each method at three learning rates of the inner AdamW (factors of the "
        f"default one) with one seed, then at its best one with {len(SEEDS)} seeds: mean and standard deviation. Outer "
        "steps are the defaults: Nesterov 0.7 / 0.9 (DiLoCo), 0.4 / 0.9 (Streaming DiLoCo). Losses in nats per byte, "
        f"of {LESS_NOISE[1].partition('=')[2]} examples.\n\n"
        + table(
            ["", *(f"lr x {factor:g}" for factor in factors), "best lr", "loss", "off", "sent per rank", "less"], rows
        )
    )
    kept = {f"{name}, lr x {factor:g}": run for (name, factor), run in swept.items()}
    for name, each in repeated.items():
        kept.update({f"{name}, seed {seed}": run for seed, run in zip(SEEDS, each, strict=True)})
    commands = tuple(dict.fromkeys(run.command for run in kept.values()))
    figures = {name: as_figures(run) for name, run in kept.items()}
    return Report("Local updates at equal tokens", body, commands, tuple(checks), figures)


def _cell(session: Session, name: str, factor: float, seed: int) -> Run:
    chosen = (*FOUR_REPLICAS, f"train.steps={STEPS}", *LESS_NOISE, *METHODS[name])
    return session.cell(*chosen, f"optim.inner.lr={BASE_RATE * factor:g}", f"train.seed={seed}")


def _best(swept: Mapping[tuple[str, float], Run]) -> dict[str, float]:
    """The factor with the lowest loss, by method."""
    found: dict[str, float] = {}
    for name, factor in swept:
        if name not in found or swept[name, factor].validation < swept[name, found[name]].validation:
            found[name] = factor
    return found
