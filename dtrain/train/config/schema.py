"""The configuration as dataclasses: what the keys are called, their types, units and defaults.

    Config
    ├── run        where the run lives and whether it goes on        ├── model   `_target_` and its keywords
    ├── mesh       replicas x shards                                 ├── data    `_target_` and its keywords
    ├── launcher   how the workers start                             ├── sync    `_target_` and its keywords
    ├── engine     what owns the shard axis                          └── optim   the inner optimizer and its schedule
    └── train      steps, batches, and how often what happens

The frozen classes are what a program reads. hydra composes into unfrozen twins of them (``composable``), as it cannot
override frozen ones.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, get_type_hints

PER_NODE = ("srun", "torchrun")
ISOLATIONS = ("none", "replica")
CONTAINER_RUNTIMES = ("pyxis", "apptainer")
TRANSPORTS = ("torch", "mpi")
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("cosine", "linear", "constant")
LAUNCHERS = ("local", "slurm", "mpi")

Settings = dict[str, object]
"""A mapping with ``_target_``: any importable callable, and the keywords it is called with."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and whether it goes on."""

    dir: str = ""
    """The run folder; empty: ``runs/YYYY-mm-dd/HH-MM-SS-<sync>``."""
    resume: str = "auto"
    """``auto`` goes on where ``dir`` left off, ``never`` refuses an existing run, PATH starts from another run's."""
    weights: str = ""
    """Parameters to begin with, everything else anew: a safetensors file such as RUN/export/model.safetensors, a
    checkpoint, or a run that has ended. Empty: the model's own first ones."""


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
class LauncherConfig:
    """How the worker processes start. Empty text and 0 mean: as the site has it."""

    name: str = "local"
    workers: int = 4
    """Ranks in all, spread evenly over ``nodes``."""
    nodes: int = 1
    max_restarts: int = 3
    """How often all workers are started again from the last checkpoint when one dies; under Slurm, how many attempts
    in a row may make no progress."""
    grace_seconds: float = 60.0
    """What the workers have between SIGTERM and SIGKILL, to write a checkpoint."""
    threads_per_worker: int = 1
    """CPU cores of a rank."""
    hang_seconds: float = 600.0
    """A rank that stands in one collective for longer ends the attempt; 0: never."""
    wait: bool = False
    """Follow a submitted job to its end."""
    environment: list[str] = field(default_factory=list)
    """``NAME=value``, set for every rank."""
    snapshot: bool = True
    """Slurm: run a copy of the code, taken when the job is submitted, which lies in its folder."""

    minutes: int = 60
    """Slurm: the time limit of one run of the job, which goes on after it."""
    gpus_per_node: int = 0
    memory_gib: int = 0
    """Per node."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    reservation: str = ""
    array_parallel: int = 0
    """How many runs of a sweep may run at the same time; 0: all."""
    per_node: str = "srun"
    """``srun``: one task per rank. ``torchrun``: one task per node, whose torchrun starts its ranks."""
    isolate: str = "none"
    """``replica``: a job step per replica, so that a dead one does not take the others with it."""
    signal_seconds: int = 120
    """The ranks are told this long before the time limit; 0: not at all."""
    address: str = ""
    """Where the ranks meet; empty: the job's first node."""
    port: int = 0
    """0: a free one."""
    interface: str = ""
    """The network interface of gloo and NCCL."""
    python: str = ""
    """The interpreter on the nodes; empty: this one."""
    setup: list[str] = field(default_factory=list)
    """Lines of the batch script before the ranks start: ``module load ...``."""
    container: str = ""
    """An image; empty: none."""
    container_runtime: str = "pyxis"
    container_args: list[str] = field(default_factory=list)
    srun_args: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)
    """Any further directive: ``mail-type=END``, ``exclusive``."""
    groups: list[str] = field(default_factory=list)
    """The components of a heterogeneous job: ``nodes=2 workers=4 constraint=a100``."""

    mpirun: str = ""
    """MPI: the mpirun to use; empty: the one on PATH."""
    hosts: list[str] = field(default_factory=list)
    """MPI: ``HOST`` or ``HOST:SLOTS``; empty: the nodes of the Slurm allocation around it, else this machine."""
    mpi_args: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What owns the shard axis."""

    name: str = "fsdp"
    precision: str = "fp32"
    activation_checkpointing: bool = False
    bucket_mib: float = 4.0
    """Gradients are handed over in buckets of at most this many MiB."""
    unused_parameters: bool = False
    """Some steps leave parameters without a gradient (experts, parts that are switched off): it counts as zero then, on
    every replica. ZeRO 1 and 2 and local updates need no word for it, and ZeRO 3 cannot do it."""


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
    """How long, on what batches, and how often what happens. Steps are optimizer steps."""

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
    """How often the ranks agree on whether somebody was asked to stop."""
    max_skipped_steps: int = 20
    """Steps in a row that are skipped for NaN or Inf gradients before the run gives up."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, composed once and frozen to ``config.yaml``. The mappings are not to be written to."""

    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: Settings = field(default_factory=dict)
    data: Settings = field(default_factory=dict)
    sync: Settings = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@functools.cache
def composable(cls: type) -> type:
    """The unfrozen twin of a frozen dataclass, with typed sections as twins and mappings as open dictionaries."""
    hints = get_type_hints(cls)
    members: list[tuple[str, Any, Any]] = []
    for entry in dataclasses.fields(cls):
        kind = hints[entry.name]
        if dataclasses.is_dataclass(kind):
            twin = composable(kind)  # type: ignore[arg-type]  # a class, as get_type_hints of a class field says
            members.append((entry.name, twin, field(default_factory=twin)))
        elif entry.default_factory is list:
            members.append((entry.name, kind, field(default_factory=list)))
        elif entry.default_factory is not dataclasses.MISSING:
            members.append((entry.name, dict[str, Any], field(default_factory=dict)))
        else:
            members.append((entry.name, kind, field(default=entry.default)))
    return dataclasses.make_dataclass(cls.__name__, members, kw_only=True)
