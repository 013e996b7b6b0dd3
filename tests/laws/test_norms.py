"""`dtrain train` evaluates a model with BatchNorm by statistics of the parameters that it evaluates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dtrain.testing import WorkerPool
from tests.laws.jobs import run

pytestmark = pytest.mark.timeout(120)


class Telling(nn.Module):
    """Its loss in evaluation is the mean that its BatchNorm has seen, which is its only parameter."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(1, affine=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        seen: Tensor = self.norm(self.scale.expand(4, 1))
        if self.training:
            loss: Tensor = (self.scale - 5).square().mean() + 0 * seen.sum()
            return loss
        return self.norm.get_buffer("running_mean").mean()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_statistics_are_those_of_the_anchor(pool: WorkerPool, text: Path, tmp_path: Path, engine: str) -> None:
    model = [f"model._target_={__name__}.Telling", "train.steps=12", "sync.every_steps=5", "train.clip_norm=0"]
    looked = run(pool, tmp_path / "looked", text, engine, "diloco", *model, "train.evaluate_every_steps=4", mesh=(2, 1))
    never = run(pool, tmp_path / "never", text, engine, "diloco", *model, "train.evaluation_examples=0", mesh=(2, 1))
    exported = load_file(tmp_path / "looked" / "export" / "model.safetensors")
    assert looked.summary["validation_loss"] == pytest.approx(float(exported["scale"]), rel=1e-5)
    assert looked.losses == never.losses and looked.digest == never.digest


class Once(nn.Module):
    """One training batch, its third, is NaN."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.norm, self.scale, self.calls = nn.BatchNorm1d(1), nn.Parameter(torch.ones(1)), 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.calls += self.training
        given = batch["input"].float().view(-1, 1) * self.scale
        if self.training and self.calls == 3:
            given = given * float("nan")
        loss: Tensor = (self.norm(given) - 1).square().mean()
        return loss


@pytest.mark.parametrize(("engine", "sync"), [("ddp", "dense"), ("fsdp", "dense"), ("zero2", "dense")])
def test_a_skipped_step_leaves_no_trace_in_running_statistics(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str, sync: str
) -> None:
    model = [f"model._target_={__name__}.Once", "train.steps=6", "train.microbatch_size=0"]
    done = run(pool, tmp_path, text, engine, sync, *model, mesh=(2, 1))
    exported = load_file(tmp_path / "export" / "model.safetensors")
    values = torch.cat([value.flatten() for value in exported.values()])
    assert done.summary["skipped_steps"] == 1 and bool(torch.isfinite(values).all())
    assert int(exported["norm.num_batches_tracked"]) == 5
    assert math.isfinite(float(str(done.summary["validation_loss"])))
