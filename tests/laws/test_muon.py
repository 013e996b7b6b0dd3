"""Muon inside on every engine: the same steps, wherever the matrices are cut, and a resume that changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dtrain.testing import WorkerPool
from tests.laws.jobs import ENGINES, Finished, run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

MUON = ("optim=muon", "train.steps=30", "optim.inner.lr=0.01", "train.evaluate_every_steps=0")


@pytest.fixture(scope="module")
def whole(pool: WorkerPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """DDP, where every rank holds all matrices."""
    return run(pool, tmp_path_factory.mktemp("muon") / "ddp", text, "ddp", "dense", *MUON)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_makes_the_steps_of_ddp(
    whole: Finished, pool: WorkerPool, text: Path, tmp_path: Path, engine: str
) -> None:
    losses = run(pool, tmp_path / engine, text, engine, "dense", *MUON).losses
    assert len(losses) == 30 and losses[30] < 0.8 * losses[1]
    for step, loss in losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=2e-4)


def test_one_rank_a_replica_makes_the_steps_of_two(
    whole: Finished, pool: WorkerPool, text: Path, tmp_path: Path
) -> None:
    alone = run(pool, tmp_path / "alone", text, "ddp", "dense", *MUON, mesh=(2, 1)).losses
    for step, loss in alone.items():
        assert loss == pytest.approx(whole.losses[step], rel=2e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_stopped_at_any_time_resumes_as_if_it_had_not_been(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str
) -> None:
    options = [*MUON, "train.steps=14", "sync.every_steps=4", "sync.compress=null"]
    undisturbed = run(pool, tmp_path / "undisturbed", text, engine, "diloco", *options)
    run(pool, tmp_path / "stopped", text, engine, "diloco", *options, "train.stop_after_steps=6")
    shutil.copytree(tmp_path / "stopped", tmp_path / "again")
    again = run(pool, tmp_path / "again", text, engine, "diloco", *options)
    assert again.losses == undisturbed.losses and again.digest == undisturbed.digest
