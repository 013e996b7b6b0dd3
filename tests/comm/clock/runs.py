"""What the worker processes run: a few steps of `dtrain train` under each of several syncs, and what they sent."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.comm.transports.meter import Count
from dtrain.testing import WorkerPool
from dtrain.train.config import Config, compose
from dtrain.train.mesh import build_mesh
from dtrain.train.setup import build
from tests.sync_words import sync_words

SMALL = (
    "model.dim=32", "model.layers=2", "model.heads=2", "data.block=32", "train.batch_size=8", "train.steps=60",
    "optim.warmup_steps=5", "optim.inner.lr=0.003", "engine.bucket_mib=0.02", "mesh.replicate=2", "mesh.shard=2",
    "launcher.workers=4",
)  # fmt: skip
ROUNDS, SGD = ("sync.every_steps=4",), ("optim=sgd", "optim.inner.momentum=0", "optim.inner.lr=0.001")
CONSTANT = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.inner.weight_decay=0")
SHORTER = {
    **dict.fromkeys(("diloco", "co2", "slowmo", "local_sgd", "delayed_diloco", "eager_diloco", "ferret"), ROUNDS),
    "streaming_diloco": ("sync.every_steps=5",), "muloco": (*ROUNDS, "optim=muon"),
    "post_local_sgd": (*ROUNDS, "sync.warmup_steps=3"), "onebit_adam": ("sync.warmup_steps=3", "optim=adamw"),
    "scaffold_m": (*ROUNDS, *SGD), "fedavg_m": (*ROUNDS, *SGD), "dgc": SGD, "one_byte": (*SGD, *CONSTANT),
    "fedkseed": (*ROUNDS, "sync.directions=16", *SGD, *CONSTANT),
}  # fmt: skip
"""So that some steps contain some rounds."""


@dataclass(frozen=True)
class Sent:
    """By one rank. ``shapes``: of the parameters, in the order of the model."""

    by: Mapping[tuple[str, str, str], Count]
    shapes: Mapping[str, tuple[int, ...]]


def composed(engine: str, sync: str, text: Path, folder: Path, *words: str) -> Config:
    """The configuration of a run on 2 replicas x 2 shards."""
    run = (f"engine={engine}", *sync_words(sync), f"data.path={text}", f"run.dir={folder}", *SMALL)
    return compose([*run, *SHORTER.get(sync, ()), *words])


def sent(pool: WorkerPool, configs: Sequence[Config], steps: int) -> list[list[Sent]]:
    """What each rank has sent under each of ``configs``, by config."""
    by_rank = pool.run(_job, list(configs), steps, world=4, seconds=30 + 30 * len(configs))
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def _job(configs: Sequence[Config], steps: int) -> list[Sent]:
    warnings.simplefilter("ignore")
    return [_run(config, steps) for config in configs]


def _run(config: Config, steps: int) -> Sent:
    mesh = build_mesh(config.mesh.replicate, config.mesh.shard)
    parts = build(config, mesh)
    for step in range(steps):
        parts.engine.set_learning_rate(parts.learning_rate(step))
        batches = parts.share.microbatches(step)
        for _ in range(parts.attached.method.samples):
            parts.attached.estimate(lambda given=batches: parts.engine.evaluate(given[0]))  # type: ignore[misc]
        if not parts.attached.method.samples:
            parts.engine.forward_backward(batches)
            parts.attached.finish()
            parts.engine.clip()
        parts.attached.step()
    parts.attached.close_round()
    by, shapes = dict(mesh.channel.meter.by), dict(parts.engine.pieces.shapes)
    parts.attached.detach(saved=True)
    mesh.control.close()
    parts.engine.close()
    mesh.close()
    return Sent(by, shapes)  # type: ignore[arg-type]  # an axis is a str
