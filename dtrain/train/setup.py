"""What a run trains with, built from its configuration: data sets, model, engine, and the sync at work.

The order is part of the contract: generators are seeded before the model is built, and the engine exists before the
sync is bound to it. Every rank builds the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.errors import DataError
from dtrain.launchers import strict_json
from dtrain.train import rng
from dtrain.train.config import Config, instantiate, run_folder
from dtrain.train.config.data_contract import DATA, check_content
from dtrain.train.config.optimizer_factory import inner_optimizer
from dtrain.train.data.batches import Share
from dtrain.train.engines import Engine, EngineOptions, build_engine
from dtrain.train.initial_model import initial_model
from dtrain.train.lr import learning_rate_factor
from dtrain.train.mesh import Mesh


@dataclass
class Parts:
    """``share``: this rank's of the training data. ``held_out``: the validation split, None where none is evaluated.

    ``learning_rate``: of a step, counted from 0.
    """

    share: Share
    held_out: Any
    tokens_per_example: int
    model: nn.Module
    engine: Engine
    attached: Attached
    learning_rate: Callable[[int], float]


def build(config: Config, mesh: Mesh) -> Parts:
    """Collective over all ranks.

    Raises ``DataError`` for data that have changed since the launch, ``ModelError``, ``ConfigError`` for weights to
    begin with that do not fit, and what data sets, models and engines raise.
    """
    data: Any = instantiate(config.data, "data", split="train")
    _check_data(config, data)
    held_out: Any = None
    if config.train.evaluation_examples:
        held_out = instantiate(config.data, "data", split="validation")
    tokens_per_example = int(data.tokens_per_example)
    rng.seed_everything(config.train.seed)
    model = initial_model(config, data, rank=mesh.rank)
    engine = _engine(config, model, mesh)
    sync = cast(Sync, instantiate(config.sync, "sync"))
    attached = sync.bind(engine.pieces, config.train.seed)
    share = Share(
        data=data,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        microbatch_size=engine.options.microbatch_size,
        rank=mesh.rank,
        world=mesh.world,
        device=mesh.device,
    )
    return Parts(share, held_out, tokens_per_example, model, engine, attached, _learning_rate(config))


def _check_data(config: Config, data: Any) -> None:
    """Whether the data are still those that the run was launched with: a restart or a requeue checks nothing else.

    One rank of each machine looks.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    folder = Path(config.run.dir)
    description, path = data.describe(), folder / DATA
    has_digest = path.is_file() and run_folder.has_digest(strict_json.read(path))
    changed = run_folder.other_data(folder, description) if has_digest else ""
    if changed:
        raise DataError(f"the data have changed since the run was launched: {changed}; bring the same files back")
    check_content(config, data, description)


def _engine(config: Config, model: nn.Module, mesh: Mesh) -> Engine:
    share = config.train.batch_size // mesh.world
    microbatch_size = config.train.microbatch_size or share
    options = EngineOptions(
        precision=config.engine.precision,
        activation_checkpointing=config.engine.activation_checkpointing,
        bucket_mib=config.engine.bucket_mib,
        clip_norm=config.train.clip_norm,
        microbatches=share // microbatch_size,
        microbatch_size=microbatch_size,
        unused_parameters=config.engine.unused_parameters,
    )

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return inner_optimizer(config.optim.inner, model)

    return build_engine(config.engine.name, model, optimizer, mesh, options)


def _learning_rate(config: Config) -> Callable[[int], float]:
    optim, peak = config.optim, float(cast(float, config.optim.inner.get("lr", 1e-3)))

    def at(step: int) -> float:
        return peak * learning_rate_factor(
            step,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            total_steps=config.train.steps,
            final_fraction=optim.final_lr_fraction,
        )

    return at
