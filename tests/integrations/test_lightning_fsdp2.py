"""Lightning's Trainer with FSDP2, on CPUs as on GPUs: two replicas, each sharded over two ranks, and a sync."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain.integrations.lightning import EXCHANGED, ShardedSyncStrategy
from dtrain.testing import WorkerPool
from tests.integrations.test_lightning import (
    END,
    METHODS,
    STOP,
    Batches,
    Entries,
    Module,
    Watch,
    declared_bytes,
    digest,
    evaluated,
    judged,
    launched,
    made,
    said,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

SHARD = {0: (70, 10, 38, 2), 1: (63, 9, 19, 1)}
"""Elements of each parameter on the ranks of a shard: 19 and 3 rows are cut into 10 and 9, 2 and 1."""

UNITS = {"dense": 2, "int8": 2, "diloco": 1, "streaming": 1}
"""Gradients are exchanged by unit of ``fully_shard``, deltas by fragment."""


class Sharded(Module):
    """``kind``: the axes of the mesh that ``fully_shard`` is given, or "none"."""

    def __init__(self, kind: str = "both", seed: int = 0) -> None:
        super().__init__("one", seed)
        self.kind = kind

    def configure_model(self) -> None:
        if self.kind == "none" or hasattr(self.net, "reshard"):
            return
        mesh = self.device_mesh
        if mesh.mesh_dim_names != ("replicate", "shard"):  # Lightning's own, for data and tensor parallelism
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        mesh = mesh["shard"] if self.kind == "shard" else mesh
        for module in (self.net[0], self.net[2], *([] if self.kind == "no root" else [self.net])):
            fully_shard(module, mesh=mesh)


def went_on(name: str, kind: str, folder: str, whole_file: bool, accumulate: int) -> dict[str, Any]:
    """What a run gives, and one that went on from its checkpoint in the middle of a round, in a new trainer."""
    found: dict[str, Any] = {}
    with launched():
        for part in ("whole", "again"):
            module, entries, watch = Sharded(kind, int(part == "again")), Entries(), Watch()
            strategy = ShardedSyncStrategy(METHODS[name], 2, save_distributed_checkpoint=not whole_file)
            trainer = made(
                strategy, folder if part == "whole" else "", logger=entries, callbacks=[watch], gradient_clip_val=0.5,
                val_check_interval=3 * accumulate, check_val_every_n_epoch=None, accumulate_grad_batches=accumulate,
            )  # fmt: skip
            checkpoint = None if part == "whole" else Path(folder) / f"step={STOP}.ckpt"
            trainer.fit(module, Batches(), judged(), ckpt_path=checkpoint)
            assert strategy.sync is None and f"{END} steps, 0 skipped" in strategy.report
            found[part] = digest(module), module.losses, module.evaluated
            if part == "whole":
                labels = {label for _, label, _ in watch.sync.meter.by if label.startswith("fragment")}
                sent = entries.logged[EXCHANGED]
                found |= {"live": watch.live[STOP], "messages": len(labels) or 1, "sent": sent[-1] - sent[0]}
        saved = Sharded(kind, seed=1)
        trainer = made(ShardedSyncStrategy(METHODS[name], 2))
        trainer.validate(saved, judged(), ckpt_path=Path(folder) / f"step={STOP}.ckpt", verbose=False)
        found["saved"] = trainer.callback_metrics["val_loss"].item()
    return found


CASES = [*((name, "both", False, 1) for name in METHODS), ("diloco", "shard", True, 2), ("int8", "both", False, 2)]


@pytest.mark.parametrize(("name", "kind", "whole_file", "accumulate"), CASES)
def test_it_goes_on_bitwise(
    pool: WorkerPool, name: str, kind: str, whole_file: bool, accumulate: int, tmp_path: Path
) -> None:
    ranks = pool.run(went_on, name, kind, str(tmp_path), whole_file, accumulate, world=4)
    one = ranks[0]
    for number, rank in enumerate(ranks):
        (end, losses, values), (its_end, its_losses, its_values) = rank["whole"], rank["again"]
        assert its_end == end == one["whole"][0] and its_losses == losses[STOP * accumulate :]
        assert its_values == {step: value for step, value in values.items() if step in its_values}
        assert values == one["whole"][2] and values[STOP] == pytest.approx(rank["saved"], abs=1e-7)
        assert losses[-1] < 0.8 * losses[0]
        if accumulate == 1:
            assert rank["sent"] == declared_bytes(name, rank["messages"] * UNITS[name], SHARD[number % 2])
    assert one["live"] == ranks[1]["live"]  # of one replica
    assert (one["live"] != ranks[2]["live"]) == (name in ("diloco", "streaming"))


def dense_and_plain() -> list[list[float]]:
    found = []
    for strategy in (ModelParallelStrategy(4, 1), ShardedSyncStrategy(METHODS["dense"], 2)):
        with launched():
            module = Sharded()
            made(strategy, max_steps=30, gradient_clip_val=0.5).fit(module, Batches())
            found.append(module.losses)
    return found


def test_dense_is_native_hsdp(pool: WorkerPool) -> None:
    for plain, dense in pool.run(dense_and_plain, world=4):
        assert len(plain) == 30 and dense == pytest.approx(plain, abs=1e-5)


def begun_anew(folder: str) -> tuple[str, str, list[float], float]:
    """Told by a checkpoint of Lightning's own; a round begun from it; its next loss, and the one of who saved it."""
    path = Path(folder) / f"step={STOP}.ckpt"
    with launched():
        before = Sharded()
        made(ModelParallelStrategy(4, 1), folder).fit(before, Batches())
        refused = made(ShardedSyncStrategy(METHODS["diloco"], 2))
        text = said(lambda: refused.fit(Sharded(seed=1), Batches(), ckpt_path=path))
        module = Sharded(seed=1)
        trainer = made(ShardedSyncStrategy(METHODS["diloco"], 2, begin_anew=True))
        trainer.fit(module, Batches(), ckpt_path=path)
        full = Module()
        full.load_state_dict({name: value.full_tensor() for name, value in module.state_dict().items()})
        assert evaluated(full) < evaluated(Module())
        return text, digest(module), module.losses, before.losses[STOP]


def test_a_round_is_begun_from_a_plain_checkpoint(pool: WorkerPool, tmp_path: Path) -> None:
    ranks = pool.run(begun_anew, str(tmp_path), world=4)
    for text, end, losses, following in ranks:
        assert text.startswith("FileNotFoundError") and "ShardedSyncStrategy(method, begin_anew=True)" in text
        assert end == ranks[0][1] and len(losses) == END - STOP
        assert losses[0] == pytest.approx(following, abs=1e-5)  # the first step is the plain run's


def refused(kind: str) -> str:
    with launched():
        strategy = ShardedSyncStrategy(METHODS["diloco"], 3 if kind == "three" else 2)
        return said(lambda: made(strategy, max_steps=1).fit(Sharded(kind), Batches()))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("three", "ValueError: 4 ranks cannot be divided among 3 replicas"),
        ("no root", "ValueError: configure_model left 2 roots of fully_shard (net.0, net.2)"),
        ("none", "ValueError: configure_model left 0 roots of fully_shard (none)"),
    ],
)
def test_what_is_refused(pool: WorkerPool, kind: str, words: str) -> None:
    for text in pool.run(refused, kind, world=4):
        assert text.startswith(words), text


def samplers() -> dict[str, int]:
    with launched():
        strategy = ShardedSyncStrategy(METHODS["diloco"], 2)
        made(strategy)
        return dict(strategy.distributed_sampler_kwargs) | {"here": dist.get_rank()}


def test_every_rank_reads_a_share_of_its_own(pool: WorkerPool) -> None:
    assert pool.run(samplers, world=4) == [{"num_replicas": 4, "rank": rank, "here": rank} for rank in range(4)]
