"""Checks beyond types: ranges, and settings that do not fit each other or this machine. All are reported at once."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dtrain.errors import CheckpointError, ConfigError
from dtrain.train import engine_registry
from dtrain.train.config.data_contract import check_data
from dtrain.train.config.model_factory import build_model
from dtrain.train.config.optimizer_factory import inner_optimizer, takes_model
from dtrain.train.config.schema import PRECISIONS, SCHEDULES, TRANSPORTS, Config
from dtrain.train.config.targets import closest, hint, instantiate
from dtrain.train.metrics.sinks import SINKS

if TYPE_CHECKING:
    from torch import nn

    from dtrain.comm.runtime.method import Sync
    from dtrain.comm.runtime.round_lengths import RoundLengths

AT_LEAST_ONE = (
    "mesh.replicate", "mesh.shard", "train.steps", "train.batch_size", "train.keep_checkpoints",
    "train.log_every_steps", "train.agree_every_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "optim.warmup_steps", "optim.final_lr_fraction", "train.seed", "train.microbatch_size", "train.clip_norm",
    "train.stop_after_steps", "train.checkpoint_every_steps", "train.evaluate_every_steps",
    "train.evaluation_examples", "train.max_skipped_steps",
)  # fmt: skip
NAMES = {
    "engine.precision": PRECISIONS,
    "optim.schedule": SCHEDULES,
    "mesh.transport": TRANSPORTS,
}


def validate(config: Config) -> dict[str, object]:
    """Check all that can be checked before anything is launched. Writes nothing.

    Returns:
        The data set's description (``describe()``): files, sizes, digest.

    Raises:
        ConfigError: naming every key that is out of range or does not fit, with its value and what would fit.
        DataError: from the data set: missing, empty or damaged.
    """
    problems = [
        *_ranges(config),
        *_mesh(config),
        *_launcher(config),
        *_engine(config),
        *_run_folder(config),
        *_metrics(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    sync = _sync(config)
    _rounds(config, sync)
    of_parameters = not takes_model(config.optim.inner)
    if of_parameters:
        _optimizer(config, sync)
    data, description = check_data(config)
    model = _model(config, data)
    if not of_parameters:
        _optimizer(config, sync, model)
    return description


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _ranges(config: Config) -> Iterator[str]:
    for key in AT_LEAST_ONE:
        value = cast(int, _value(config, key))
        if value < 1:
            yield f"{key} must be at least 1, but is {value}"
    for key in NOT_NEGATIVE:
        number = cast(float, _value(config, key))
        if not (number >= 0 and math.isfinite(number)):
            yield f"{key} must be 0 or more, but is {number}"
    if config.optim.final_lr_fraction > 1:
        yield f"optim.final_lr_fraction is a fraction between 0 and 1, but is {config.optim.final_lr_fraction}"
    if not (config.engine.bucket_mib > 0 and math.isfinite(config.engine.bucket_mib)):
        yield f"engine.bucket_mib must be more than 0, but is {config.engine.bucket_mib}"
    for key, names in {"engine.name": engine_registry.names(), **NAMES}.items():
        name = str(_value(config, key))
        if name not in names:
            yield f"{key} is {name}{hint(closest(name, names))} (there are {', '.join(names)})"
    for keyword, setting in config.optim.inner.items():
        for element in setting if isinstance(setting, list | tuple) else [setting]:
            if isinstance(element, float) and not math.isfinite(element):
                yield f"optim.inner.{keyword} must be finite, but is {setting}"


def _mesh(config: Config) -> Iterator[str]:
    replicas, shards, workers = config.mesh.replicate, config.mesh.shard, config.launcher.workers
    if min(replicas, shards, workers) < 1:
        return
    world = replicas * shards
    if world != workers:
        yield (
            f"the mesh is {replicas} replicas x {shards} shards = {world} ranks, but there are {workers} workers; set "
            f"launcher.workers={world}, or choose mesh.replicate and mesh.shard whose product is {workers}"
        )
        return  # what else must fit depends on which of the two is changed
    batch, micro = config.train.batch_size, config.train.microbatch_size
    if batch < 1:
        return
    if batch % world:
        near = " or ".join(str(n) for n in (batch // world * world, (batch // world + 1) * world) if n)
        yield f"train.batch_size is {batch}, which {world} ranks cannot share equally; choose {near}"
    elif micro > 0 and (batch // world) % micro:
        yield (
            f"train.microbatch_size is {micro}, but a rank's share of the batch is {batch // world} examples; choose a "
            "divisor of it, or 0 for all at once"
        )


def _launcher(config: Config) -> Iterator[str]:
    yield from config.launcher.problems(config.mesh.replicate)
    if config.mesh.transport == "mpi" and not config.launcher.has_mpi:
        yield "mesh.transport=mpi needs ranks that mpirun has started: take launcher=mpi, or mesh.transport=torch"


def warnings(config: Config) -> list[str]:
    """What will run, but most likely not as intended."""
    unlikely, steps = [], config.train.steps
    per_node = config.launcher.workers // max(1, config.launcher.nodes)
    if config.launcher.nodes > 1 and config.mesh.shard > per_node:
        unlikely.append(
            f"a replica of {config.mesh.shard} shards spans several nodes of {per_node} workers, so the engine's own "
            "traffic, which no sync makes smaller, crosses the slow links; mesh.shard is best at most "
            f"{per_node} here"
        )
    warmup, period = config.sync.get("warmup_steps", 0), config.sync.get("every_steps", 0)
    if isinstance(warmup, int) and warmup >= steps:
        unlikely.append(f"sync.warmup_steps={warmup} is all of train.steps={steps}: the run ends in its warm-up")
    elif isinstance(period, int) and isinstance(warmup, int) and period > steps - warmup:
        unlikely.append(
            f"sync.every_steps={period} is more than the {steps - warmup} steps there are: the replicas train alone "
            "and are combined once, at the end"
        )
    return [*unlikely, *_unlikely_rounds(config)]


def _unlikely_rounds(config: Config) -> Iterator[str]:
    """Of rounds that change in length."""
    rounds, steps = config.sync.get("every_steps"), _steps_of_rounds(config)
    if not isinstance(rounds, Mapping):
        return
    name, rising = str(rounds.get("_target_")), config.optim.warmup_steps - (config.train.steps - steps)
    planned, short = rounds.get("steps"), rounds.get("warmup_steps", 0)
    if name == "dtrain.rounds.power" and isinstance(planned, int) and planned > steps > 0:
        yield (
            f"sync.every_steps.steps={planned} is more than the {steps} steps of rounds that there are: the last "
            "rounds of the power law are left out"
        )
    if name == "dtrain.rounds.qsr" and isinstance(short, int) and short < rising:
        yield (
            f"the learning rate rises for {rising} steps of rounds, in which the quadratic rule would make them long; "
            f"sync.every_steps.warmup_steps={rising} keeps them short there"
        )


def _engine(config: Config) -> Iterator[str]:
    if config.engine.name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        yield f"engine {config.engine.name} needs DeepSpeed, which is not installed: pip install 'dtrain[zero]'"


def _metrics(config: Config) -> Iterator[str]:
    """Before anything is launched: a package that rank 0 lacks would otherwise be missed when the run is over."""
    for name in config.metrics:
        if name not in SINKS:
            yield f"metrics has {name!r}{hint(closest(name, SINKS))} (there are {', '.join(SINKS)})"
        elif importlib.util.find_spec(SINKS[name][0]) is None:
            extra = "train" if name == "tensorboard" else name
            yield f"metrics=[{name}] needs {SINKS[name][0]}, which is not installed: pip install 'dtrain[{extra}]'"


def _run_folder(config: Config) -> Iterator[str]:
    """The nearest existing folder must be writable; nothing is written."""
    path = Path(config.run.dir).absolute()
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        yield f"run.dir={config.run.dir}: {existing} is a file, not a folder; choose another run.dir"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"run.dir={config.run.dir}: {existing} cannot be written to; choose another run.dir"


def _sync(config: Config) -> Sync:
    from dtrain.comm.runtime.method import Sync

    sync = instantiate(config.sync, "sync")
    if not isinstance(sync, Sync):
        target = config.sync["_target_"]
        raise ConfigError(f"sync: {target} makes a {type(sync).__name__}, no sync: take dtrain.every_step, for example")
    return sync


def _rounds(config: Config, sync: Sync) -> None:
    """Refuse rounds that end before training does."""
    lengths: RoundLengths | None = getattr(sync, "lengths", None)
    steps = _steps_of_rounds(config)
    if lengths is not None and lengths.steps is not None and lengths.steps < steps:
        raise ConfigError(
            f"sync.every_steps: {lengths} has rounds for {lengths.steps} steps, and the run has {steps} (train.steps="
            f"{config.train.steps} less sync.warmup_steps); give rounds for all of them"
        )


def _steps_of_rounds(config: Config) -> int:
    warmup = config.sync.get("warmup_steps", 0)
    return config.train.steps - (warmup if isinstance(warmup, int) else 0)


def _optimizer(config: Config, sync: Sync, model: nn.Module | None = None) -> None:
    """Run its own checks, and those of the sync, on ``model``, or on one parameter."""
    import torch

    optimizer = inner_optimizer(config.optim.inner, torch.nn.Linear(1, 1, bias=False) if model is None else model)
    try:
        sync.require_inner(optimizer)
    except ValueError as error:
        raise ConfigError(f"sync and optim.inner do not go together: {error}") from error
    if sync.constant_rate and (config.optim.schedule != "constant" or config.optim.warmup_steps):
        raise ConfigError(
            f"sync: {type(sync).__name__} needs one learning rate from the first step to the last, and the schedule is "
            f"{config.optim.schedule} with {config.optim.warmup_steps} steps of warm-up; set optim.schedule=constant "
            "optim.warmup_steps=0"
        )


def _model(config: Config, data: object) -> nn.Module:
    """Run its own checks on the meta device: nothing is allocated, however large the model."""
    import torch

    try:
        with torch.device("meta"):
            model = build_model(config.model, data)
    except Exception:  # some models read their values in the constructor; and only a real one raises the real error
        model = build_model(config.model, data)
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    sparse = [name for name, module in model.named_modules() if isinstance(module, embeddings) and module.sparse]
    if sparse:
        raise ConfigError(
            f"model: {', '.join(sparse[:3])} of {config.model['_target_']} makes sparse gradients, which are neither "
            "clipped nor exchanged, nor taken by AdamW: build it with sparse=False"
        )
    if config.run.weights:
        from dtrain.train.checkpoint.weights import put_into, weights_of

        try:
            weights = weights_of(Path(config.run.weights), dict(model.named_parameters()))
            put_into(model, weights, f"run.weights={config.run.weights}")
        except CheckpointError as error:
            raise ConfigError(f"{error}; give a safetensors file, a checkpoint or a run of this model") from error
    return model
