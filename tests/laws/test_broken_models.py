"""A model that fails on its first batch fails in words, on every engine, and in a way that is not started again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain.testing import WorkerPool
from tests.laws.jobs import run

pytestmark = pytest.mark.timeout(120)


class Broken(nn.Module):
    """Breaks the contract as ``how`` says."""

    def __init__(self, how: str, **_: object) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.ones(3))

    def forward(self, batch: dict[str, Tensor]) -> object:
        loss = self.weight * batch["input"].float().mean()
        if self.how == "key":
            return batch["labels"]
        return {"vector": loss, "tuple": (loss.mean(), loss)}[self.how]


VECTOR = "ModelError: the model must be model(batch) -> Tensor: the scalar mean loss, but it returned Tensor[3] of"
TUPLE = "but it returned a tuple (scalar Tensor of float32, Tensor[3] of float32): return the loss alone"
KEY = "FailedAtTheStart: KeyError: 'labels' (the batch has input: Tensor[8, 32] of int64"


@pytest.mark.parametrize(
    ("engine", "how", "evaluated", "said"),  # the first call is that of an evaluation, or of a step
    [
        ("ddp", "vector", 8, VECTOR),
        ("ddp", "key", 0, KEY),
        ("fsdp", "tuple", 0, TUPLE),
        ("fsdp", "key", 8, KEY),
        ("zero1", "vector", 0, VECTOR),
    ],
)
def test_the_first_batch_says_what_is_wrong(
    engine: str, how: str, evaluated: int, said: str, pool: WorkerPool, text: Path, tmp_path: Path
) -> None:
    model = [f"model._target_={__name__}.Broken", f"model.how={how}", f"train.evaluation_examples={evaluated}"]
    with pytest.raises(RuntimeError) as failed:
        run(pool, tmp_path, text, engine, "dense", *model, mesh=(1, 1))
    assert said in str(failed.value)
