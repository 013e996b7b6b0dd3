"""Training that has broken down never costs what was saved before: whatever is left on disk is finite."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dtrain.comm.layout import Segment
from dtrain.errors import DtrainError, FailedTwice, ResumeError
from dtrain.testing import WorkerPool
from dtrain.train.checkpoint import Placement, RankState, read_manifest
from dtrain.train.checkpoint.finite import check_finite
from dtrain.train.checkpoint.folders import step_folders, step_of
from dtrain.train.checkpoint.write import write
from dtrain.train.config import Config, compose
from dtrain.train.trainer import train

pytestmark = pytest.mark.timeout(120)


class Breaks(nn.Module):
    """From step ``at`` on, to before step ``until``: on rank ``rank``, what ``how`` says."""

    def __init__(self, how: str, at: int, rank: int, until: int = 1000) -> None:
        super().__init__()
        self.how, self.bad, self.rank = how, range(at, until), rank
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.table = nn.Parameter(torch.zeros(4))  # of which the loss needs the first row only
        self.step = 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        bad = torch.is_grad_enabled() and self.step in self.bad and int(os.environ["RANK"]) == self.rank
        self.step += torch.is_grad_enabled()
        if bad and self.how in ("weight", "spare"):
            with torch.no_grad():
                if self.how == "weight":
                    next(self.blocks.parameters()).mul_(float("nan"))
                else:
                    self.table[1:] = float("nan")
        found = batch["input"][:, :8].float() / 128
        for block in self.blocks:
            found = block(found)
        loss = found.square().mean() + self.table[0]
        if not bad:
            return loss
        if self.how == "error":
            raise IndexError(f"no such label at {id(self):#x}")
        return loss * float("nan") if self.how == "loss" else loss


def small(folder: Path, text: Path, *overrides: str) -> Config:
    return compose([
        f"run.dir={folder}", f"data.path={text}", "data.block=16", "mesh.replicate=2", "mesh.shard=1", "sync=dense",
        "launcher.workers=2", "engine=ddp", "model=custom", f"model._target_={__name__}.Breaks", "train.batch_size=4",
        "train.steps=30", "train.checkpoint_every_steps=5", "train.max_skipped_steps=6", "train.evaluation_examples=0",
        "train.agree_every_steps=1", "train.log_every_steps=1", *overrides,
    ])  # fmt: skip


class Ended(NamedTuple):
    """``how``: the name of the error, with exit code ``number``; or the reason of the outcome at step ``number``."""

    how: str
    number: int
    message: str = ""


def ended(config: Config, stop_at: int = 0) -> Ended:
    """How one rank's training ended; asked to stop at step ``stop_at``."""
    seen = [0]
    try:
        outcome = train(
            config,
            requested=lambda: signal.SIGTERM if stop_at and seen[0] >= stop_at - 1 else 0,
            on_step=lambda step: seen.__setitem__(0, step),
        )
    except DtrainError as error:
        return Ended(type(error).__name__, error.exit_code, str(error))
    except IndexError as error:
        return Ended("IndexError", 1, str(error))
    return Ended(outcome.reason, outcome.step, "withheld" if outcome.withheld else "")


def broken(how: str, at: int, rank: int, until: int = 1000) -> list[str]:
    return [f"model.how={how}", f"model.at={at}", f"model.rank={rank}", f"model.until={until}"]


def left(folder: Path) -> list[int]:
    """The steps of the checkpoints there, all of which are finite."""
    paths = step_folders(folder / "checkpoints")
    for path in paths:
        check_finite(path, read_manifest(path))
    return [step_of(path) or 0 for path in paths]


@pytest.mark.parametrize(("engine", "rank"), [("ddp", 0), ("ddp", 1), ("fsdp", 1), ("zero2", 0)])
def test_what_was_saved_before_weights_became_nan_stays(
    engine: str, rank: int, pool: WorkerPool, text: Path, tmp_path: Path
) -> None:
    config = small(tmp_path, text, f"engine={engine}", *broken("weight", 12, rank))
    for name, code, message in pool.run(ended, config, world=2):
        assert (name, code) == ("TooManySkippedSteps", 2)
        assert "step-0000000010, is as it was" in message and "run.weights=" in message
    assert left(tmp_path) == [5, 10]
    assert not (tmp_path / "outcome.json").exists()


def test_a_checkpoint_waits_for_a_step_that_is_not_skipped(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    config = small(tmp_path, text, *broken("loss", 13, 1, until=17), "train.stop_after_steps=19")
    assert pool.run(ended, config, world=2) == [Ended("stopped", 19)] * 2
    assert left(tmp_path) == [18, 19]  # that of step 15 was due within the row


@pytest.mark.parametrize("rank", [0, 1])
def test_a_replica_that_skips_alone_holds_a_checkpoint_up(
    rank: int, pool: WorkerPool, text: Path, tmp_path: Path
) -> None:
    config = small(tmp_path, text, *broken("weight", 12, rank), "sync=diloco", "sync.every_steps=100")
    results = pool.run(ended, config, 18, world=2)  # told to stop while one replica has gone astray
    assert results == [Ended("signal", 18, "withheld")] * 2
    assert left(tmp_path) == [5, 10]


def test_a_run_whose_last_steps_are_skipped_does_not_end_well(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    config = small(tmp_path, text, *broken("loss", 13, 0), "train.stop_after_steps=15")
    for name, code, message in pool.run(ended, config, world=2):
        assert (name, code) == ("TooManySkippedSteps", 2) and "train.stop_after_steps=..." in message
    assert left(tmp_path) == [5, 10] and not (tmp_path / "summary.json").exists()
    config = small(tmp_path / "all", text, *broken("loss", 0, 0), "train.steps=6")
    for name, code, message in pool.run(ended, config, world=2):
        assert (name, code) == ("TooManySkippedSteps", 2) and "all steps" in message and "no checkpoint" in message
    assert left(tmp_path / "all") == [] and not (tmp_path / "all" / "export").exists()


def test_nan_that_no_gradient_shows_is_not_saved(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    config = small(tmp_path, text, *broken("spare", 7, 1))
    for name, code, message in pool.run(ended, config, world=2):
        assert (name, code) == ("NotFinite", 2)
        assert "parameters of table on rank 1 holds NaN or Inf" in message
    assert left(tmp_path) == [5]


def test_a_checkpoint_from_before_that_holds_nan_is_passed_over_aloud(
    pool: WorkerPool, text: Path, tmp_path: Path
) -> None:
    config = small(tmp_path, text, *broken("loss", 1000, 0), "train.stop_after_steps=8")
    pool.run(ended, config, world=2)
    assert left(tmp_path) == [5, 8]
    poison(tmp_path / "checkpoints", 9, config)
    on = small(tmp_path, text, *broken("loss", 1000, 0), "train.stop_after_steps=12")
    assert pool.run(ended, on, world=2) == [Ended("stopped", 12)] * 2
    told = (tmp_path / "metrics.jsonl").read_text()
    assert "DAMAGED CHECKPOINT" in told and "parameters of blocks.0.bias holds NaN or Inf" in told
    poison(tmp_path / "other" / "checkpoints", 9, config)
    for name, code, message in pool.run(ended, small(tmp_path / "other", text, *broken("loss", 1000, 0)), world=2):
        assert (name, code) == ("ResumeError", ResumeError.exit_code) and "none of them can be used" in message


def poison(folder: Path, step: int, config: Config) -> None:
    """A checkpoint with NaN in it, as versions before this one wrote them."""
    numels = {f"blocks.{n}.{name}": size for n in (0, 1) for name, size in (("weight", 64), ("bias", 8))} | {"table": 4}
    segments = {fqn: Segment(fqn, 0, numel) for fqn, numel in numels.items()}
    values = {fqn: torch.full((numel,), float("nan")) for fqn, numel in numels.items()}
    state = RankState(segments, {"parameters": values}, {"parameters": "replicated"}, {"steps": step})
    shapes = {fqn: (numel,) for fqn, numel in numels.items()}
    write(folder, step=step, state=state, place=Placement(0, 1, 0, 1), shapes=shapes, barrier=lambda: None, keep=9)


def test_an_error_that_a_restart_meets_again_is_not_met_a_third_time(
    pool: WorkerPool, text: Path, tmp_path: Path
) -> None:
    config = small(tmp_path, text, *broken("error", 7, 0), "mesh.replicate=1", "launcher.workers=1")
    assert pool.run(ended, config, world=1)[0][0] == "IndexError"
    again = small(tmp_path, text, *broken("error", 2, 0), "mesh.replicate=1", "launcher.workers=1")  # from step 5
    ((name, code, message),) = pool.run(ended, again, world=1)
    assert (name, code) == (FailedTwice.__name__, 2)
    assert "IndexError: no such label" in message and "step 7 failed like this before" in message
