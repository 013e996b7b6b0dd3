"""The configuration as dataclasses: keys, types, units and defaults.

    Config
    ├── run        where the run lives and whether it resumes        ├── model   `_target_` and its keywords
    ├── mesh       replicas x shards                                 ├── data    `_target_` and its keywords
    ├── launcher   how the workers start: `dtrain.launchers`         ├── sync    `_target_` and its keywords
    ├── engine     what owns the shard axis                          ├── optim   the inner optimizer and its schedule
    ├── train      steps, batches and intervals                      └── metrics where rows of metrics go

The frozen classes are what a program reads. hydra composes into unfrozen twins of them (``composable``), as it cannot
override frozen ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

from dtrain.launchers import registry
from dtrain.launchers.launcher import Launcher

TRANSPORTS = ("torch", "mpi")
PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("cosine", "linear", "constant")

LAUNCHER_DEFAULTS = {"workers": 4, "max_restarts": 3}
"""Defaults of the command line that differ from those of a program that uses a launcher itself."""

Settings = dict[str, object]
"""A mapping with ``_target_``: any importable callable, and the keywords it is called with."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and whether it resumes."""

    dir: str = ""
    """The run folder; empty: ``runs/YYYY-mm-dd/HH-MM-SS-<sync>``."""
    resume: str = "auto"
    """``auto`` resumes the run in ``dir``, ``never`` refuses an existing one, PATH starts from another run."""
    weights: str = ""
    """Initial parameters, with all other state new: a safetensors file such as RUN/export/model.safetensors, a
    checkpoint, or a run that has ended. Empty: the model's own initialization."""
    report: bool = True
    """Whether the run draws its page, ``report.html``, when it ends."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The two axes; rank = replica * shard + index of the shard."""

    replicate: int = 2
    """Replicas: the slow links lie between them."""
    shard: int = 2
    """Ranks in a replica, which the engine shards over."""
    transport: str = "torch"
    """What carries the replicate axis: ``torch`` (gloo or NCCL) or ``mpi``, which needs ``launcher=mpi``."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What owns the shard axis."""

    name: str = "fsdp"
    precision: str = "fp32"
    activation_checkpointing: bool = False
    bucket_mib: float = 4.0
    """The largest bucket of gradients that is exchanged, in MiB."""
    unused_parameters: bool = False
    """Allow steps that leave parameters without a gradient (experts, disabled modules); it then counts as zero on every
    replica. ZeRO 1 and 2 and local updates do not need it, and ZeRO 3 does not support it."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The inner optimizer and the schedule of its learning rate."""

    inner: Settings = field(default_factory=dict)
    """``_target_`` of a torch optimizer, and its keywords; the parameters are given to it."""
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1
    """The learning rate at the end of the schedule, as a fraction of its peak."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches and intervals. Steps are optimizer steps."""

    steps: int = 300
    seed: int = 1
    batch_size: int = 32
    """Examples per optimizer step, over all ranks."""
    microbatch_size: int = 0
    """Examples per forward on one rank; 0: all of the rank's share at once."""
    clip_norm: float = 1.0
    """The largest norm of the whole gradient; 0: no clipping."""
    stop_after_steps: int = 0
    """Checkpoint and end at this step, leaving the schedule of ``steps`` as it is; 0: run to the end."""
    checkpoint_every_steps: int = 100
    """0: only at the end."""
    keep_checkpoints: int = 2
    evaluate_every_steps: int = 100
    """0: only at the end."""
    evaluation_examples: int = 64
    """Examples of the validation split per evaluation, over all ranks; 0: no evaluation."""
    log_every_steps: int = 10
    agree_every_steps: int = 5
    """How often the ranks agree on whether any of them was asked to stop."""
    max_skipped_steps: int = 20
    """Steps in a row that are skipped for NaN or Inf gradients before the run gives up."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, composed once and frozen to ``config.yaml``. Do not modify the mappings."""

    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    launcher: Launcher = field(default_factory=lambda: registry.made({"name": "local", **LAUNCHER_DEFAULTS}))
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: Settings = field(default_factory=dict)
    data: Settings = field(default_factory=dict)
    sync: Settings = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: tuple[str, ...] = ("tensorboard",)
    """Where rows of metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio."""


SECTIONS = tuple(entry.name for entry in fields(Config) if entry.default is MISSING)
"""The keys of the top level that hold further keys."""


def types_of(section: type) -> dict[str, Any]:
    """The types of a section's keys by name; those of subsections are classes that this function takes.

    ``launcher`` has the keys of all launchers; its ``name`` says which one it is.
    """
    if section is Launcher:
        return {name: _composed(key.type) for name, key in registry.keys().items()}
    return get_type_hints(section)


def _composed(kind: Any) -> Any:
    """The type for hydra, which has lists but no variable-length tuples."""
    return list[get_args(kind)[0]] if get_origin(kind) is tuple else kind  # type: ignore[misc]  # a type at runtime


def is_section(kind: object) -> bool:
    """Whether a key holds further keys."""
    return kind is Launcher or dataclasses.is_dataclass(kind)


def composable(section: type) -> type:
    """The unfrozen twin of a section, with sections in it as twins and mappings as open dictionaries."""
    if section is Launcher:
        keys = {name: (key.type, LAUNCHER_DEFAULTS.get(name, key.default)) for name, key in registry.keys().items()}
        return _twin(section.__name__, keys)
    types = types_of(section)
    return _twin(section.__name__, {entry.name: (types[entry.name], entry.default) for entry in fields(section)})


def _twin(name: str, keys: Mapping[str, tuple[Any, object]]) -> type:
    members: list[tuple[str, Any, Any]] = []
    for key, (kind, default) in keys.items():
        if is_section(kind):
            twin = composable(kind)
            members.append((key, twin, field(default_factory=twin)))
        elif isinstance(default, tuple):
            members.append((key, _composed(kind), field(default_factory=partial(list, default))))
        elif default is MISSING:
            members.append((key, dict[str, Any], field(default_factory=dict)))
        else:
            members.append((key, kind, field(default=default)))
    return dataclasses.make_dataclass(name, members, kw_only=True)
