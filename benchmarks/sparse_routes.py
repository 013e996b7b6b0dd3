"""The report on routes of top-k: the all-gather beside two phases, at equal bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.compression import FOUR_REPLICAS, LESS_NOISE
from benchmarks.few_bytes import differences
from benchmarks.harness import Run, Session, as_figures
from benchmarks.page import Report, at_most, table
from dtrain.report.figures import in_bytes

STEPS, SEEDS, DENSITY = 500, (1, 2, 3), 0.01
GATHERED = 0.0049
"""What is gathered from four replicas at the bytes of two phases, a little fewer for longer positions."""
TWO_PHASE, ALL_GATHER, DENSE = "two phases, 1 %", "all-gather, 0.49 %", "dense"
ROWS = {
    DENSE: ("sync=dense",),
    TWO_PHASE: ("sync=every_step", "compress=topk_ef", f"sync.compress.compressor.density={DENSITY}",
                "sync.route=two_phase"),
    ALL_GATHER: ("sync=every_step", "compress=topk_ef", f"sync.compress.compressor.density={GATHERED}",
                 "sync.route=all_gather"),
}  # fmt: skip


def sparse_routes(session: Session) -> Report:
    """Three seeds of each."""
    common = (*FOUR_REPLICAS, f"train.steps={STEPS}", *LESS_NOISE, "optim=adamw")
    runs = {
        name: [session.cell(*common, *words, f"train.seed={seed}") for seed in SEEDS] for name, words in ROWS.items()
    }
    return sparse_routes_report(runs)


def sparse_routes_report(runs: Mapping[str, Sequence[Run]]) -> Report:
    """``runs``: by row, one for each seed."""
    rows = []
    for name, by_seed in runs.items():
        losses = [run.validation for run in by_seed]
        off = statistics.mean(differences(by_seed, runs[DENSE]))
        rows.append([name, f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}", f"{off:+.1f} %",
                     in_bytes(by_seed[0].summary.sent_bytes_per_rank)])  # fmt: skip
    ratio = runs[ALL_GATHER][0].summary.sent_bytes_per_rank / runs[TWO_PHASE][0].summary.sent_bytes_per_rank
    body = (
        f"{STEPS} steps of AdamW on the default text and model, DDP, four replicas, top-k with EF14; mean and standard "
        f"deviation over seeds {SEEDS[0]} to {SEEDS[-1]}. On the two-phase route the owner of a chunk keeps the "
        "largest of the mean of what it got; an all-gather loses nothing on the way, and sends twice as much for the "
        "same density among four.\n\n" + table(["top-k", "validation loss", "against dense", "sent per rank"], rows)
    )
    off = statistics.mean(differences(runs[ALL_GATHER], runs[TWO_PHASE]))
    checks = (
        at_most("loss of the all-gather, above that of two phases", off, -8.0, " %"),
        at_most("its bytes, beside those of two phases", 100 * ratio, 100, " %"),
    )
    kept = {f"{name}, seed {seed}": run for name, by in runs.items() for seed, run in zip(SEEDS, by, strict=True)}
    figures = {name: as_figures(run) for name, run in kept.items()}
    return Report("Routes of top-k", body, tuple(run.command for run in kept.values()), checks, figures)
