"""What the laws' worker processes run, and the small run that all of them share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.testing import WorkerPool
from dtrain.train import engine_registry
from dtrain.train.config import compose
from dtrain.train.trainer import Outcome, train
from tests.sync_words import sync_words

ENGINES = engine_registry.names()
SYNCS = ("dense", "int8_ef", "diloco")
FIFTEEN = [(engine, sync) for engine in ENGINES for sync in SYNCS]

SMALL = (
    "model.dim=32", "model.layers=2", "model.heads=2", "data.block=32", "train.batch_size=8", "train.steps=60",
    "train.log_every_steps=1", "train.evaluation_examples=8", "train.evaluate_every_steps=0", "optim.warmup_steps=5",
    "train.checkpoint_every_steps=0", "optim.inner.lr=0.003", "engine.bucket_mib=0.08",
    "run.report=false",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    folder: Path
    outcomes: list[Outcome]

    @property
    def losses(self) -> dict[int, float]:
        return self._column("loss")

    @property
    def gradient_norms(self) -> dict[int, float]:
        return self._column("gradient_norm")

    def _column(self, name: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row[name] for row in rows if name in row}

    @property
    def summary(self) -> dict[str, float | int | str]:
        found: dict[str, float | int | str] = json.loads((self.folder / "summary.json").read_text())
        return found

    @property
    def digest(self) -> str:
        return str(self.summary["parameters_digest"])


def run(
    pool: WorkerPool, folder: Path, text: Path, engine: str, sync: str, *overrides: str, mesh: Sequence[int] = (2, 2)
) -> Finished:
    """Train the small run in the pool's processes."""
    replicas, shards = mesh
    group = [f"mesh.replicate={replicas}", f"mesh.shard={shards}", f"launcher.workers={replicas * shards}"]
    extra = ["sync.every_steps=10"] if sync in ("diloco", "local_sgd") else []
    chosen = [f"engine={engine}", *sync_words(sync), f"run.dir={folder}", f"data.path={text}", *group, *SMALL, *extra]
    config = compose([*chosen, *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    return Finished(folder, pool.run(train_once, config, world=replicas * shards))


def train_once(config):  # type: ignore[no-untyped-def]
    """One rank's part of a run."""
    return train(config)
