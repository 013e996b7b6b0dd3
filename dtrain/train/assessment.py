"""How good a trained model is: its loss on a split, as perplexity, and as bits per byte where tokens are bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtrain.train.data.batches import Examples, evaluation_indices, fetch

__all__ = ["Assessment", "assess"]


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """``loss``: mean over ``examples`` examples of ``tokens_per_example`` tokens, in nats per token. ``bytes``: whether
    tokens are bytes.
    """

    loss: float
    examples: int
    tokens_per_example: int
    bytes: bool

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that is more than a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss / ln 2; None where a token is not a byte."""
        return self.loss / math.log(2) if self.bytes else None

    def as_dict(self) -> dict[str, float | int | None]:
        """All figures by name."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "examples": self.examples,
            "tokens": self.examples * self.tokens_per_example,
        }


def assess(model: nn.Module, data: Examples, *, examples: int = 0, batch_size: int = 16) -> Assessment:
    """The loss of ``model`` on ``examples`` examples spread evenly over ``data``, on all of them for 0.

    The model is called in eval mode on the device where its parameters are, and is left in the mode it was in. With as
    many examples as ``train.evaluation_examples`` they are those that training evaluates.
    """
    indices: Sequence[int] = evaluation_indices(len(data), examples or len(data), rank=0, world=1)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training, total = model.training, 0.0
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                batch = {name: tensor.to(device) for name, tensor in fetch(data, chosen).items()}
                total += float(model(batch).float()) * len(chosen)
    finally:
        model.train(training)
    known: Any = data
    tokenizer = getattr(known, "tokenizer", None)
    return Assessment(
        loss=total / len(indices),
        examples=len(indices),
        tokens_per_example=int(known.tokens_per_example),
        bytes=isinstance(tokenizer, Mapping) and tokenizer.get("name") == "bytes",
    )
