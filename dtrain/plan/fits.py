"""What fits: each way to place a model on a machine, with its memory by term, or the reason why it is rejected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from dtrain.plan.describe import Casts, Description
from dtrain.plan.machine import GB, Machine
from dtrain.plan.memory import Memory, OptimizerMemory, replayed
from dtrain.plan.placement import Placement
from dtrain.plan.sync_memory import NOTHING, SyncMemory

Describe = Callable[[Casts, bool, bool], Description]
"""(how bf16 is reached, checkpointed, reentrant) -> the model, for the microbatch of the plan."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to place a model. ``engine`` "hsdp" is fsdp on several replicas under a sync that exchanges gradients."""

    engine: str
    replicas: int
    shards: int
    checkpointed: bool
    bf16: bool
    microbatches: int = 1
    bucket_mib: float = 4.0

    @property
    def runs(self) -> str:
        """The engine of the command that runs it."""
        return "fsdp" if self.engine == "hsdp" else self.engine

    @property
    def casts(self) -> Casts:
        """See `dtrain.plan.describe.Casts`."""
        if not self.bf16:
            return "none"
        return "autocast" if self.engine == "ddp" else "model"


@dataclass(frozen=True)
class Fit:
    """A layout with its memory. ``missing``: bytes by which it does not fit, 0 where it does. ``broke``: the term
    without which it would fit, or the largest.
    """

    layout: Layout
    memory: Memory
    missing: int
    broke: str

    @property
    def reason(self) -> str:
        """Why it is rejected; empty where it fits."""
        if not self.missing:
            return ""
        size = self.memory.terms[self.broke] / GB
        return f"{self.missing / GB:.2f} GB too much in {self.memory.during}: {self.broke} take {size:.2f} GB"


class NothingFits(Exception):
    """``nearest``: the layout that needs the least."""

    def __init__(self, nearest: Fit, machine: Machine) -> None:
        self.nearest = nearest
        layout = nearest.layout
        advice = _advice(nearest)
        super().__init__(
            f"the model fits nowhere on {machine.name} ({machine.usable_bytes / GB:.2f} GB usable a rank): the nearest "
            f"is engine={layout.runs} mesh.shard={layout.shards} engine.activation_checkpointing="
            f"{str(layout.checkpointed).lower()}, which needs {nearest.memory.peak / GB:.2f} GB, "
            f"{nearest.missing / GB:.2f} GB more; {nearest.broke} take {nearest.memory.terms[nearest.broke] / GB:.2f} "
            f"GB of it. {advice}"
        )


def layouts(
    *, ranks: int, shards: Sequence[int], bf16: bool, microbatches: int, exchanges: bool, bucket_mib: float = 4.0
) -> Iterator[Layout]:
    """All layouts of ``ranks`` ranks with these numbers of shards. ``exchanges``: whether gradients leave a replica."""
    for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp"):
        for shard in shards:
            if ranks % shard or (engine.startswith("zero") and shard == 1):
                continue
            replicas = ranks // shard
            name = "hsdp" if engine == "fsdp" and exchanges and replicas > 1 and shard > 1 else engine
            for checkpointed in (False, True):
                yield Layout(
                    engine=name, replicas=replicas, shards=shard, checkpointed=checkpointed, bf16=bf16,
                    microbatches=microbatches, bucket_mib=bucket_mib,
                )  # fmt: skip


def fit(
    layout: Layout,
    model: Description,
    machine: Machine,
    optimizer: Callable[[Sequence[tuple[int, ...]]], OptimizerMemory],
    sync: SyncMemory = NOTHING,
) -> Fit:
    """``layout`` on ``machine``."""
    placement = Placement(
        shards=layout.shards,
        bf16=layout.bf16,
        bucket_mib=layout.bucket_mib,
        microbatches=layout.microbatches,
        exchanged=sync.exchanges,
    )
    memory = replayed(model, layout.runs, placement, optimizer, sync)
    missing = max(0, memory.peak - machine.usable_bytes)
    return Fit(layout, memory, missing, _broke(memory.terms, missing))


def fits(
    candidates: Sequence[Layout],
    describe: Describe,
    machine: Machine,
    optimizer: Callable[[Sequence[tuple[int, ...]]], OptimizerMemory],
    sync: Callable[[Layout], SyncMemory],
) -> list[Fit]:
    """All candidates, those that fit first, each with the fewest shards first. ``sync``: what it keeps in a layout.

    Raises ``NothingFits`` where all are rejected.
    """
    known, costs = cache(describe), cache(lambda shapes: optimizer(list(shapes)))
    found = []
    for layout in candidates:
        reentrant = layout.checkpointed and layout.engine == "zero3"
        model = known(layout.casts, layout.checkpointed, reentrant)
        found.append(fit(layout, model, machine, lambda shapes: costs(tuple(shapes)), sync(layout)))
    found.sort(key=lambda f: (bool(f.missing), f.layout.checkpointed, f.layout.shards, f.memory.peak))
    if found and all(f.missing for f in found):
        raise NothingFits(min(found, key=lambda f: f.memory.peak), machine)
    return found


def torch_optimizer(
    factory: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
) -> Callable[[Sequence[tuple[int, ...]]], OptimizerMemory]:
    """`optimizer_memory` of ``factory``, for `fits`."""
    from dtrain.plan.memory import optimizer_memory

    return lambda shapes: optimizer_memory(factory, shapes)


def _broke(terms: Mapping[str, int], missing: int) -> str:
    """The smallest term that is as large as what is missing; the largest of all if there is none."""
    enough = [term for term, size in terms.items() if size >= missing > 0]
    if enough:
        return min(enough, key=lambda term: terms[term])
    return max(terms, key=lambda term: terms[term], default="parameters")


def _advice(nearest: Fit) -> str:
    layout, broke = nearest.layout, nearest.broke
    if broke in ("activations", "inputs"):
        return "Take a smaller train.microbatch_size, or a shorter data.block"
    if broke in ("feedback", "outer parameters", "outer momentum", "in flight", "other sync state"):
        return "Take a sync that keeps less, more shards, or sync.outer_state=offloaded on GPUs"
    more = "engine.precision=bf16, " if not layout.bf16 else ""
    return f"Take {more}more ranks in a replica (mesh.shard={2 * layout.shards}), or a machine with more memory"
