"""What an engine says of a model that does not return a scalar loss."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dtrain.errors import ModelError
from dtrain.train.engines.contract import described, loss_of
from dtrain.train.failure_memory import may_pass

BATCH = {"input": torch.zeros(2, 3, dtype=torch.long), "weight": torch.ones(2)}
SEEN = "the batch has input: Tensor[2, 3] of int64, weight: Tensor[2] of float32"
W = torch.ones(4, requires_grad=True)


def test_a_scalar_loss_passes_as_it_is() -> None:
    loss = W.mean()
    assert loss_of(lambda batch: loss, BATCH) is loss
    with torch.no_grad():
        assert loss_of(lambda batch: W.sum(), BATCH) == 4


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (W * 2, "Tensor[4] of float32: take its mean(), or squeeze() it"),
        (W[:1], "Tensor[1] of float32: take its mean(), or squeeze() it"),
        ((W.mean(), W), "a tuple (scalar Tensor of float32, Tensor[4] of float32): return the loss alone"),
        ({"loss": W.mean()}, "loss: scalar Tensor of float32: return the loss alone"),
        (None, "a NoneType: return the loss alone"),
        (1.5, "a float: return the loss alone"),
        (torch.tensor(3), "scalar Tensor of int64: a loss is a floating-point number"),
        (W.mean().detach(), "scalar Tensor of float32 without a gradient: no parameter has a part in it"),
    ],
)
def test_anything_else_is_told_with_the_contract_and_the_batch(returned: object, said: str) -> None:
    with pytest.raises(
        ModelError, match=re.escape(f"must be model(batch) -> Tensor: the scalar mean loss, but it returned {said}")
    ) as refused:
        loss_of(lambda batch: returned, BATCH)
    assert SEEN in str(refused.value) and refused.value.exit_code == 2


def test_what_the_model_raises_says_what_the_batch_was() -> None:
    def model(batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]

    with pytest.raises(KeyError, match="labels") as raised:
        loss_of(model, BATCH)  # type: ignore[arg-type]  # as a user writes it
    assert raised.value.__notes__ == [SEEN]


class PreTrainedModel(torch.nn.Module):
    """As those of transformers: inputs one by one, and more than a loss comes back."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": W.mean()}


def test_models_of_transformers_are_told_how_they_are_wrapped() -> None:
    with pytest.raises(ModelError, match="return the loss alone, of a model that is not yours"):
        loss_of(PreTrainedModel(), BATCH)

    class Deaf(PreTrainedModel):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            raise AttributeError("'dict' object has no attribute 'shape'")

    with pytest.raises(AttributeError) as raised:
        loss_of(Deaf(), BATCH)
    assert "takes its inputs one by one: wrap it in a module" in raised.value.__notes__[0]


def test_descriptions_end() -> None:
    assert described({}) == "nothing" and described([1, "a"]) == "a list (a int, a str)"


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (KeyError("labels"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x3 and 4x4)"), False),
        (ModelError("said already"), True),  # as it is: exit code 2 is its own
        (OSError("stale file handle"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
    ],
)
def test_only_what_may_be_better_next_time_is_started_again(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
