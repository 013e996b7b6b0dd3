"""Muon inside on every engine: the same steps, wherever the matrices are cut, and a resume that changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain import every_step, inner
from dtrain.testing import WorkerPool
from dtrain.train.engines import EngineOptions, build_engine
from dtrain.train.mesh import build_mesh
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


class Narrow(nn.Module):
    """Matrices of a single row or column, of which a rank of two holds nothing, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [nn.Linear(9, 1, bias=False), nn.Linear(1, 6), nn.Linear(6, 9, bias=False), nn.Conv2d(1, 3, 2)]
        self.blocks = nn.ModuleList(shapes)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        narrow, wide, square, convolution = self.blocks
        x = square(torch.tanh(wide(narrow(batch["x"]))))
        loss: Tensor = convolution(x.view(-1, 1, 3, 3)).square().mean() + x.square().mean()
        return loss


def narrow_steps(engine_name: str) -> dict[str, tuple[int, Tensor]]:
    """This rank's offset and piece of each parameter after three steps of a replica of two ranks."""
    mesh = build_mesh(1, 2)
    torch.manual_seed(0)
    options = EngineOptions(
        precision="fp32", activation_checkpointing=False, bucket_mib=1, clip_norm=1.0, microbatches=1, microbatch_size=4
    )
    engine = build_engine(engine_name, Narrow(), lambda model: inner.muon(model, 0.05), mesh, options)
    attached = every_step().bind(engine.pieces, 0)
    for step in range(3):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + mesh.rank))
        engine.forward_backward([{"x": x}])
        attached.finish()
        engine.clip()
        assert attached.step()
    pieces = engine.pieces
    held = {fqn: (pieces.segments[fqn].offset, values.clone()) for fqn, values in pieces.read().items()}
    engine.close()
    return held


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_matrices_of_which_a_rank_holds_nothing(pool: WorkerPool, engine: str) -> None:
    def whole_of(ranks: list[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
        fqns = sorted({fqn for held in ranks for fqn in held})
        ordered = {
            fqn: sorted((held[fqn] for held in ranks if fqn in held), key=lambda piece: piece[0]) for fqn in fqns
        }
        return {fqn: torch.cat([values for _, values in pieces]) for fqn, pieces in ordered.items()}

    reference, ours = (whole_of(pool.run(narrow_steps, name, world=2)) for name in ("ddp", engine))
    assert reference.keys() == ours.keys()
    for fqn, values in reference.items():
        torch.testing.assert_close(ours[fqn], values, rtol=1e-4, atol=1e-5)
