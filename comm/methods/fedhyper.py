"""FedHyper's learning rate for the outer step (Wang et al., arXiv:2310.03156): larger while successive rounds agree.

    a <- clip(a + kappa cos(D, D of the last round), -0.8, 4);    anchor <- anchor - (1 + a) D

The original adds the inner product over the model, which grows with its size; the cosine does not. With kappa = 0 it is
Local SGD (FedAvg). Each fragment has its own a. Communication: 3 numbers over the shards of a sharded replica.
Keeps: the last mean pseudo-gradient, and a for each fragment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.comm.outer_optimizers import PLAIN, Round
from dtrain.comm.state import Kind, State

LEAST, MOST = -0.8, 4.0


@dataclass(frozen=True)
class FedHyper:
    """See `fedhyper`."""

    kappa: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"last_delta": "replicated"}

    def look(self, fqn: str, delta: Tensor, state: State) -> Tensor:
        """[3]: <delta, last delta>, <delta, delta>, <last delta, last delta>; to be summed over all pieces."""
        last = state.get(fqn, "last_delta", delta)
        return torch.stack([torch.dot(delta, last), torch.dot(delta, delta), torch.dot(last, last)])

    def choose(self, sums: Tensor, scalar: float) -> float:
        """The next a."""
        product, square, last_square = sums.tolist()
        cosine = product / math.sqrt(square * last_square) if 0 < square * last_square < math.inf else 0.0
        return min(MOST, max(LEAST, scalar + self.kappa * cosine))

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        state.stage(fqn, "last_delta", delta.clone())
        return anchor - (1 + now.scalar) * delta


def fedhyper(*, kappa: float = 0.1) -> FedHyper:
    """An outer step whose learning rate grows while successive pseudo-gradients agree.

    Args:
        kappa: how fast it adapts; 0 leaves the learning rate at 1.

    >>> fedhyper().kinds
    {'last_delta': 'replicated'}

    Raises ``ValueError`` for a negative kappa. Source: arXiv:2310.03156.
    """
    if not kappa >= 0:
        raise ValueError(f"kappa is {kappa!r}; give 0 or more, for example 0.1")
    return FedHyper(float(kappa))
