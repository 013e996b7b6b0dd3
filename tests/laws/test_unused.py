"""Parameters that some steps leave without a gradient: replicas that use others stay one, or it is said what to set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.errors import ConfigError
from dtrain.testing import WorkerPool
from dtrain.train.config import compose
from dtrain.train.config.validation import validate
from tests.laws.jobs import run

pytestmark = pytest.mark.timeout(120)

made: list[nn.Module] = []
FEW = ["model=custom", "train.steps=6", "train.evaluation_examples=0", "optim.inner.lr=0.01"]


class Experts(nn.Module):
    """One of two experts by rank and step, and a layer that no loss ever needs."""

    def __init__(self, sparse: bool = False, frozen: bool = False, **_: object) -> None:
        super().__init__()
        made.append(self)
        self.embedding = nn.Embedding(256, 8, sparse=sparse)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.idle = nn.Linear(8, 8)
        self.step = 0
        for parameter in self.parameters() if frozen else ():
            parameter.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.step += 1
        expert = self.experts[(int(os.environ["RANK"]) + self.step // 2) % 2]
        loss: Tensor = (expert(self.embedding(batch["input"])) - 1).square().mean()
        return loss


@pytest.mark.parametrize(
    ("engine", "sync", "key"),
    [
        ("ddp", "dense", True), ("ddp", "int8_ef", True), ("zero1", "dense", False),
        ("fsdp", "dense", True),
        ("ddp", "local_sgd", False), ("fsdp", "local_sgd", False),
    ],
)  # fmt: skip
def test_replicas_that_use_other_parameters_stay_one(
    engine: str, sync: str, key: bool, pool: WorkerPool, text: Path, tmp_path: Path
) -> None:
    model = [f"model._target_={__name__}.Experts", *(["engine.unused_parameters=true"] if key else [])]
    more = ["sync.every_steps=2"] if sync == "local_sgd" else []
    done = run(pool, tmp_path, text, engine, sync, *FEW, *model, *more, mesh=(2, 1))
    assert done.losses[6] < done.losses[1] and done.summary["skipped_steps"] == 0
    one, other = pool.run(held, world=2)
    assert one == other


def held() -> list[float]:
    """The parameters of the last model that this process has trained."""
    found = [p.detach() for p in made[-1].parameters()]
    return [float(x) for p in found for x in (p.to_local() if isinstance(p, DTensor) else p).flatten()]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_without_the_key_the_first_step_names_it(engine: str, pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    model = [f"model._target_={__name__}.Experts", "train.microbatch_size=2"]
    with pytest.raises(RuntimeError, match=r"ModelError: .*engine\.unused_parameters=true"):
        run(pool, tmp_path, text, engine, "dense", *FEW, *model, mesh=(2, 1))


def test_sparse_gradients_are_refused_before_anything_is_launched(text: Path, tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path}", f"data.path={text}", "data.block=16", f"model._target_={__name__}.Experts"]
    with pytest.raises(ConfigError, match=r"embedding of .*Experts makes sparse gradients.*sparse=False"):
        validate(compose(["model=custom", *words, "model.sparse=true"]))


def test_a_model_without_anything_to_train_says_so(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    model = [f"model._target_={__name__}.Experts", "model.frozen=true"]
    with pytest.raises(RuntimeError, match=r"ModelError: .*Experts has no parameter that requires a gradient"):
        run(pool, tmp_path, text, "ddp", "dense", *FEW, *model, mesh=(1, 1))
