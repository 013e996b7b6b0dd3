"""Outer optimizers: what turns the mean pseudo-gradient of a round into the next anchor. Elementwise, in fp32.

SGD, with heavy-ball momentum or without:   m = mu m + d;          anchor -= lr m
Nesterov, as torch.optim.SGD defines it:    m = mu m + d;          anchor -= lr (d + mu m)
Keeps: one fp32 momentum for each element if mu is not 0, equal on all replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dtrain.comm.state import Kind, State


class OuterOptimizer(Protocol):
    """A rule from (anchor, mean pseudo-gradient, state) to the next anchor; new state is staged."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """The names that it keeps."""

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State) -> Tensor:
        """The next anchor. ``delta`` = old anchor - new parameters, so it has a gradient's sign. All [n] fp32."""


@dataclass(frozen=True)
class Momentum:
    """See `sgd` and `nesterov`."""

    lr: float
    momentum: float
    nesterov: bool

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"momentum": "replicated"} if self.momentum else {}

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State) -> Tensor:
        direction = delta
        if self.momentum:
            direction = self.momentum * state.get(fqn, "momentum", anchor) + delta
            state.stage(fqn, "momentum", direction)
            if self.nesterov:
                direction = delta + self.momentum * direction
        return anchor - self.lr * direction


def sgd(*, lr: float = 1.0, momentum: float = 0.0) -> Momentum:
    """Outer SGD. With ``lr=1`` and no momentum the new anchor is the mean of the replicas' parameters.

    >>> sgd().kinds
    {}

    Raises ``ValueError`` for a learning rate that is not positive or a momentum outside [0, 1).
    """
    _check(lr, momentum)
    return Momentum(lr, momentum, nesterov=False)


def nesterov(*, lr: float = 0.7, momentum: float = 0.9) -> Momentum:
    """Outer Nesterov SGD, DiLoCo's choice (arXiv:2311.08105). The first step moves lr (1 + momentum) of the delta.

    >>> nesterov().kinds
    {'momentum': 'replicated'}

    Raises ``ValueError`` for a learning rate that is not positive or a momentum outside (0, 1).
    """
    _check(lr, momentum)
    if not momentum:
        raise ValueError("Nesterov's rule without momentum is plain SGD; use sgd(lr=...)")
    return Momentum(lr, momentum, nesterov=True)


def _check(lr: float, momentum: float) -> None:
    if not lr > 0:
        raise ValueError(f"lr is {lr!r}; an outer learning rate is positive, usually between 0.1 and 1")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum!r}; it lies in [0, 1)")
