"""One rank of `dtrain bench train`: ``python -m dtrain.bench.train_worker FOLDER/bench.json``.

Each sync has a model and an optimizer of its own, and beside it stands the same training without communication between
replicas; they are stepped in turn, and both are gone before the next sync has its turn. Rank 0 appends to rows.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from dtrain.bench import train_rows
from dtrain.bench.load import Load, Watch, of_machines, why_invalid
from dtrain.bench.rows import append
from dtrain.bench.train_rows import TrainRow
from dtrain.bench.train_settings import TrainSettings, cell_folder
from dtrain.bench.training import ALONE, Block, Training, block_steps
from dtrain.comm.transports.json_gather import gather_json
from dtrain.launchers import rendezvous as meeting
from dtrain.launchers.probe import await_gloo_threads
from dtrain.report.environment import record
from dtrain.train.config import Config, load
from dtrain.train.mesh import own_device
from dtrain.train.metrics import read
from dtrain.train.results import dense_bytes
from dtrain.train.trainer import train

__all__ = ["cell", "main"]


def cell(name: str, config: Config, settings: TrainSettings) -> TrainRow:
    """One row, the same on every rank: rounds of a block alone, one with the sync, and one alone again."""
    alone, measured = Training(dataclasses.replace(config, sync=ALONE)), Training(config)
    steps, lead = block_steps(config, settings)
    for _ in range(settings.warmup):
        alone.block(steps)
        measured.block(steps, lead)
    watch = Watch()
    began = watch.look()
    rounds = [(alone.block(steps), measured.block(steps, lead), alone.block(steps)) for _ in range(settings.rounds)]
    load = watch.since(began)
    parameters = sum(torch.Size(shape).numel() for shape in measured.parts.engine.pieces.shapes.values())
    dense = dense_bytes(parameters, config.mesh.replicate, config.mesh.shard)
    for training in (measured, alone):
        training.close()
    report = {"rounds": [[dataclasses.astuple(block) for block in turn] for turn in rounds]}
    return row(name, config, steps, dense, gather_json({**report, "load": dataclasses.asdict(load)}))


def row(name: str, config: Config, steps: int, dense: int, reports: Sequence[Mapping[str, Any]]) -> TrainRow:
    """The row made of all ranks' reports: of each block what the slowest, or busiest, rank says."""
    by_round = zip(*(report["rounds"] for report in reports), strict=True)
    turns = [
        [Block(*map(max, zip(*of_ranks, strict=True))) for of_ranks in zip(*turn, strict=True)] for turn in by_round
    ]
    before, measured, after = zip(*turns, strict=True)
    busy, foreign = of_machines(Load(**report["load"]) for report in reports)
    return TrainRow(
        sync=name, engine=config.engine.name, replicas=config.mesh.replicate, shards=config.mesh.shard,
        block_steps=steps, seconds=[block.seconds for block in measured],
        alone_seconds=[block.seconds for block in before], again_seconds=[block.seconds for block in after],
        exposed_seconds=statistics.median(block.exposed for block in measured),
        sent_bytes=round(statistics.median(block.sent for block in measured)), dense_bytes=dense,
        cpu_busy=busy, cpu_foreign=foreign, invalid=why_invalid(0.0, foreign, 0.0),
    )  # fmt: skip


def trained(config: Config) -> tuple[list[int], list[float]]:
    """Train as `dtrain train` does; the steps after which was evaluated, and the validation losses."""
    train(config)
    rows = [row for row in read(Path(config.run.dir) / "metrics.jsonl") if "validation_loss" in row]
    return [int(cast(int, row["step"])) for row in rows], [float(cast(float, row["validation_loss"])) for row in rows]


def main(path: Path) -> None:
    """Measure every sync, and train it if that is asked for."""
    settings, folder = TrainSettings.read(path), path.parent
    os.environ.setdefault("DTRAIN_COMPILE", "early")  # a long run has its kernels compiled; here that is warm-up
    device = own_device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **meeting.of_environment())
    if first := dist.get_rank() == 0:
        (folder / "environment.json").write_text(json.dumps(record(), indent=1) + "\n")
        print(train_rows.HEAD, flush=True)
    rows: list[TrainRow] = []
    for number, name in enumerate(settings.syncs):
        config = load(folder / cell_folder(number, name) / "config.yaml")
        measured = cell(name, config, settings)
        if settings.steps:
            evaluated_at, losses = trained(config)
            measured = dataclasses.replace(measured, evaluated_at=evaluated_at, losses=losses)
        rows.append(measured)
        if first:
            append(folder / "rows.jsonl", measured)
            print(train_rows.line(measured, rows), flush=True)
    dist.destroy_process_group()
    await_gloo_threads()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
