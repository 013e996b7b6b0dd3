"""What was trained with gradients is tuned to text of another style, by what fits through next to no link.

First a model learns Python, by data parallelism. Then replicas tune it to C++ (the headers that come with torch): by
gradients all the way, and by each method of shared randomness. Functions that end in ``_report`` are pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.compression import LESS_NOISE
from benchmarks.harness import Run, Session, as_figures
from benchmarks.page import Report, at_most, table
from dtrain.report.figures import in_bytes

REPLICAS, BASE_STEPS = 2, 600
MESH = ("engine=ddp", f"mesh.replicate={REPLICAS}", "mesh.shard=1", f"launcher.workers={REPLICAS}")
PLAIN = ("optim=sgd", "optim.inner.momentum=0")
METHODS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "data parallelism, AdamW": (("sync=dense", "train.steps=200"), (3e-4, 1e-3, 3e-3)),
    "Ferret, AdamW": (("sync=ferret", "train.steps=200", "sync.outer.lr=3"), (3e-4, 1e-3, 3e-3)),
    "one byte": (("sync=one_byte", "train.steps=400", "sync.samples=2", *PLAIN), (3e-4, 1e-3, 3e-3)),
    "FedKSeed": (("sync=fedkseed", "train.steps=400", *PLAIN), (1e-4, 3e-4, 1e-3)),
}
"""By name: what to run, and the inner learning rates to choose from."""


def fine_tuning(session: Session) -> Report:
    """Each method at three learning rates; the best one counts."""
    with session.training(*MESH, "sync=dense", f"train.steps={BASE_STEPS}", *LESS_NOISE) as running:
        pass
    base = running.finished()
    headers = Path(torch.__file__).parent / "include" / "c10"
    tuned = {}
    for name, (method, rates) in METHODS.items():
        for rate in rates:
            tuned[name, rate] = session.train(
                *MESH, f"data.path={headers}", "data.suffixes=[.h]", f"run.weights={running.folder}", *LESS_NOISE,
                *method, f"optim.inner.lr={rate:g}",
            )  # fmt: skip
    return fine_tuning_report(base, tuned)


def fine_tuning_report(base: Run, tuned: Mapping[tuple[str, float], Run]) -> Report:
    """``tuned``: by method and learning rate."""
    rows, checks = [], []
    for name in dict.fromkeys(method for method, _ in tuned):
        runs = {rate: run for (method, rate), run in tuned.items() if method == name}
        rate = min(runs, key=lambda one: runs[one].validation)
        run, summary = runs[rate], runs[rate].summary
        rows.append([
            name, ", ".join(f"{one:g}: {tried.validation:.4f}" for one, tried in runs.items()), f"{summary.steps}",
            f"{run.validations[0]:.4f}", f"{run.validation:.4f}", in_bytes(summary.sent_bytes_per_rank / summary.steps),
            in_bytes(summary.sent_bytes_per_rank),
        ])  # fmt: skip
        checks.append(
            at_most(f"validation loss by {name}, of what it began with", run.validation / run.validations[0], 1)
        )
    body = (
        f"{BASE_STEPS} steps of data parallelism on Python's standard library, to {base.validation:.4f} nats per byte; "
        f"then {REPLICAS} replicas tune these weights to C++ (the headers of torch's c10), each at three learning "
        "rates. Losses on headers that are held out, nats per byte. Bytes are those that a replica sends.\n\n"
        + table(["", "lr: loss", "steps", "before", "after", "sent per step", "sent"], rows)
    )
    made = {"base": base} | {f"{name}, lr {rate:g}": run for (name, rate), run in tuned.items()}
    commands = tuple(run.command for run in made.values())
    return Report("Tuning what was trained, through next to no link", body, commands, tuple(checks),
                  {name: as_figures(run) for name, run in made.items()})  # fmt: skip
