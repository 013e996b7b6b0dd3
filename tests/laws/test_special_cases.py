"""Special cases in which two methods are one, and what a non-finite gradient does, on real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.comm.runtime.method import Sync
from dtrain.errors import TooManySkippedSteps
from dtrain.testing import WorkerPool
from dtrain.train.config import Config, compose, instantiate
from dtrain.train.engines import EngineOptions, build_engine
from dtrain.train.mesh import build_mesh
from dtrain.train.trainer import train
from tests.laws.jobs import ENGINES, SMALL, SYNCS, run
from tests.sync_words import sync_words

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


@pytest.mark.parametrize("engine", ENGINES)
def test_diloco_of_one_step_with_plain_sgd_is_data_parallelism(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str
) -> None:
    options = ["optim=sgd", "optim.inner.momentum=0", "train.clip_norm=0", "train.stop_after_steps=12"]
    outer = ["compress=none", "sync.every_steps=1", "sync.outer.lr=1", "sync.outer.momentum=0"]
    dense = run(pool, tmp_path / "dense", text, engine, "dense", *options)
    local = run(
        pool, tmp_path / "local", text, engine, "diloco", *options, *outer, "sync.outer._target_=dtrain.outer.sgd"
    )
    for step, loss in dense.losses.items():
        assert local.losses[step] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_non_finite_gradient_of_one_rank_is_a_step_that_nobody_made(pool: WorkerPool, engine: str) -> None:
    for rank in pool.run(poisoned_steps, engine):
        for sync, (changed, skipped, kept) in zip(SYNCS, rank, strict=True):
            assert not changed, sync
            assert skipped == 1, sync
            assert kept, sync


def poisoned_steps(engine: str) -> list[tuple[bool, int, bool]]:
    return [poisoned_step(engine, sync) for sync in SYNCS]


def poisoned_step(engine_name: str, sync_name: str) -> tuple[bool, int, bool]:
    """Two good steps, one in which rank 1's batch holds Inf, one good: what the bad one changed on this rank."""
    config = compose([*sync_words(sync_name), f"engine={engine_name}"])
    mesh = build_mesh(2, 2)
    torch.manual_seed(0)
    options = EngineOptions(
        precision="fp32", activation_checkpointing=False, bucket_mib=1, clip_norm=1.0, microbatches=1, microbatch_size=4
    )
    engine = build_engine(
        engine_name, Small(), lambda model: torch.optim.AdamW(model.parameters(), lr=0.01), mesh, options
    )
    sync: Sync = instantiate(config.sync, "sync")  # type: ignore[assignment]
    attached = sync.bind(engine.pieces, 0)

    def step(poison: bool) -> bool:
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(dist.get_rank()))
        if poison and dist.get_rank() == 1:
            x[0, 0] = float("inf")
        engine.forward_backward([{"x": x}])
        attached.finish()
        engine.clip()
        return attached.step()

    stepped = [step(False), step(False)]
    before = engine.pieces.read()
    state = {(f, n): t.clone() for f, named in attached.state.tensors.items() for n, t in named.items()}
    moments = {f"{n}.{f}": t.clone() for n, named in engine.pieces.optimizer_state().items() for f, t in named.items()}
    stepped.append(step(True))
    after = engine.pieces.read()
    # Under local updates only the replica of the bad rank skips: the other one does not even hear of it.
    mine = sync_name != "diloco" or mesh.replica == 0
    same = all(torch.equal(before[fqn], after[fqn]) for fqn in before)
    kept = all(torch.equal(t, attached.state.tensors[fqn][name]) for (fqn, name), t in state.items())
    now = {f"{n}.{f}": t for n, named in engine.pieces.optimizer_state().items() for f, t in named.items()}
    kept = kept and (not mine or all(torch.equal(t, now[key]) for key, t in moments.items()))
    stepped.append(step(False))
    finite = all(bool(value.isfinite().all()) for value in engine.pieces.read().values())
    skipped = attached.skipped if mine else 1 - attached.skipped
    attached.detach()
    mesh.control.close()
    engine.close()
    right = stepped == [True, True, not mine, True]
    return (not same if mine else same), skipped, kept and finite and right


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(9, 9, bias=False) for _ in range(2)])
        self.out = nn.Linear(9, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * x.clamp(max=1e30)
        loss: Tensor = self.out(x).square().mean()
        return loss


def test_too_many_skipped_steps_end_the_run(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    config = compose(
        [
            *SMALL,
            f"data.path={text}",
            f"run.dir={tmp_path}",
            "train.max_skipped_steps=3",
            "model._target_=tests.laws.test_special_cases.NeverFinite",
            "~model.dim",
            "~model.layers",
            "~model.heads",
            "~model.tied_embeddings",
        ]
    )
    for message in pool.run(expect_too_many, config):
        assert "4 steps in a row" in message
        assert "max_skipped_steps=3" in message


class NeverFinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.weight * float("nan")).sum()


def expect_too_many(config: Config) -> str:
    try:
        train(config)
    except TooManySkippedSteps as error:
        return str(error)
    return "nothing was raised"
