"""Outer optimizers: from outer parameters (the anchor) and mean pseudo-gradient d to the next ones. Elementwise, fp32.

SGD, with heavy-ball momentum or without:   m = mu m + d;          anchor -= lr m
    clipped (CO2):                          m = clip(mu m + d, -limit, limit)
Nesterov, as torch.optim.SGD defines it:    m = mu m + d;          anchor -= lr (d + mu m)
Adam (FedAdam, arXiv:2003.00295):           m = b1 m + (1 - b1) d;  v = b2 v + (1 - b2) d^2
                                            anchor -= lr m / (sqrt(v) + eps)
SlowMo (arXiv:1910.00643), g the inner lr:  m = mu m + d / g;      anchor -= lr g m      g: its mean over the round

Keeps: one fp32 momentum for each element if mu is not 0, equal on all replicas; Adam two.

An outer step is bound by memory: on CPU those with momentum make one pass over it, in place (`InPlace`), by a kernel
whose eager definition is its reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dtrain.comm.kernels import Constant, Kernel, by_blocks, kernel
from dtrain.comm.state import Kind, State

BLOCK = 512


@dataclass(frozen=True)
class Round:
    """The values of a round that an outer step may use.

    ``inner_lr``: the inner learning rate, its mean over the steps of the round, the same on all replicas.
    ``every_steps``: the steps of that round, which is the last that has ended; a delayed method applies the
    pseudo-gradient of the one before it. ``last_lr``: the rate of the last round in which it was above 0, else 0.
    ``scalar``: what a `Looking` outer optimizer chose.
    """

    inner_lr: float = 1.0
    every_steps: int = 1
    scalar: float = 0.0
    last_lr: float = 0.0


PLAIN = Round()


class OuterOptimizer(Protocol):
    """A rule from (anchor, mean pseudo-gradient, state) to the next anchor; new state is staged.

    One that reads ``now.inner_lr`` may set ``uses_inner_lr``: it is then refused where there are several rates.
    """

    @property
    def kinds(self) -> dict[str, Kind]:
        """The names that it keeps."""

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        """The next anchor. ``delta`` = old anchor - new parameters, so it has a gradient's sign. All [n] fp32."""


@runtime_checkable
class Looking(OuterOptimizer, Protocol):
    """An outer optimizer that chooses one scalar for a whole fragment before it steps."""

    def look(self, fqn: str, delta: Tensor, state: State) -> Tensor:
        """Statistics [k] of one piece, to be summed over all pieces of the fragment."""

    def choose(self, sums: Tensor, scalar: float) -> float:
        """The fragment's next scalar, from those sums and the last scalar, which begins at 0."""


@runtime_checkable
class InPlace(OuterOptimizer, Protocol):
    """An outer optimizer that can also step in place."""

    def step_(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        """`step`, with the same bits, in the memory of ``anchor`` and of the committed ``state``."""


# Kernels: blocks [1, n, block]; first the inputs, then those that are also outputs.


@kernel
def momentum_step(
    delta: Tensor, anchor: Tensor, momentum: Tensor, *, lr: float, factor: float, nesterov: bool, clip: float | None
) -> None:
    """Move ``anchor`` by a step with momentum."""
    momentum.mul_(factor).add_(delta)
    if clip is not None:
        momentum.clamp_(-clip, clip)
    along = (factor * momentum).add_(delta) if nesterov else momentum
    anchor.sub_(lr * along)


def in_one_pass(step: Kernel, flat: Sequence[Tensor], *numbers: Tensor, constants: Mapping[str, Constant]) -> None:
    """Run ``step`` over tensors ``flat`` [n], with ``numbers`` behind the first of them.

    On GPU it runs eagerly: compiled code may round once where this rounds twice.
    """
    run = step if flat[0].device.type == "cpu" else step.function

    def blocks(first: Tensor, *others: Tensor) -> None:
        run(first, *numbers, *others, **constants)

    by_blocks(blocks, [(tensor.unsqueeze(0), 1, 1) for tensor in flat], flat[0].numel(), BLOCK)


@dataclass(frozen=True)
class Momentum:
    """See `sgd` and `nesterov`."""

    lr: float
    momentum: float
    nesterov: bool
    clip: float | None = None

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"momentum": "replicated"} if self.momentum else {}

    @property
    def constants(self) -> dict[str, Constant]:
        """Those of `momentum_step`."""
        return {"lr": self.lr, "factor": self.momentum, "nesterov": self.nesterov, "clip": self.clip}

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        return self._moved(fqn, anchor.clone(), delta, state, copy=True)

    def step_(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        return self._moved(fqn, anchor, delta, state, copy=False)

    def _moved(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, *, copy: bool) -> Tensor:
        if self.momentum:
            momentum = writable(state, fqn, "momentum", anchor, copy=copy)
            in_one_pass(momentum_step, (delta, anchor, momentum), constants=self.constants)
        else:
            anchor.sub_(self.lr * (delta if self.clip is None else delta.clamp(-self.clip, self.clip)))
        return anchor


@dataclass(frozen=True)
class Adam:
    """See `adam`."""

    lr: float
    betas: tuple[float, float]
    eps: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"momentum": "replicated", "variance": "replicated"}

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        first, second = self.betas
        mean = first * state.get(fqn, "momentum", anchor) + (1 - first) * delta
        variance = second * state.get(fqn, "variance", anchor) + (1 - second) * delta.square()
        state.stage(fqn, "momentum", mean)
        state.stage(fqn, "variance", variance)
        return anchor - self.lr * mean / (variance.sqrt() + self.eps)


@dataclass(frozen=True)
class SlowMomentum:
    """See `slowmo`."""

    lr: float
    momentum: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"momentum": "replicated"} if self.momentum else {}

    @property
    def uses_inner_lr(self) -> bool:
        return self.momentum > 0

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        if not self.momentum:
            return anchor - self.lr * delta
        if now.inner_lr <= 0:  # no unit for the momentum: a plain average, and the momentum stays
            state.stage(fqn, "momentum", state.get(fqn, "momentum", anchor))
            return anchor - delta
        # Where the rate rises, the old momentum is not scaled up with it: a restart would overshoot.
        rising = 0 < now.last_lr < now.inner_lr
        factor = self.momentum * (now.last_lr / now.inner_lr) if rising else self.momentum
        slow = factor * state.get(fqn, "momentum", anchor) + delta / now.inner_lr
        state.stage(fqn, "momentum", slow)
        return anchor - self.lr * now.inner_lr * slow


def writable(state: State, fqn: str, name: str, like: Tensor, *, copy: bool) -> Tensor:
    """The committed tensor, a ``copy`` of it, or zeros if there is none yet; staged, and may be written to."""
    committed = state.get(fqn, name, like)
    tensor = committed.clone() if copy else committed
    state.stage(fqn, name, tensor)
    return tensor


def sgd(*, lr: float = 1.0, momentum: float = 0.0, clip: float | None = None) -> Momentum:
    """Outer SGD. With ``lr=1`` and no momentum the new anchor is the mean of the replicas' parameters.

    ``clip``: bound on the absolute value of the momentum's elements.

    >>> sgd().kinds
    {}

    Raises ``ValueError`` for a learning rate or a limit that is not positive, or a momentum outside [0, 1).
    """
    checked(lr, momentum)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip!r}; give the largest absolute value of an element, or None")
    return Momentum(lr, momentum, nesterov=False, clip=clip)


def nesterov(*, lr: float = 0.7, momentum: float = 0.9) -> Momentum:
    """Outer Nesterov SGD, DiLoCo's choice (arXiv:2311.08105). The first step moves lr (1 + momentum) times the delta.

    >>> nesterov().kinds
    {'momentum': 'replicated'}

    Raises ``ValueError`` for a learning rate that is not positive or a momentum outside (0, 1).
    """
    checked(lr, momentum)
    if not momentum:
        raise ValueError("Nesterov's rule without momentum is plain SGD; use sgd(lr=...)")
    return Momentum(lr, momentum, nesterov=True)


def adam(*, lr: float, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3) -> Adam:
    """Outer Adam, FedAdam (Reddi et al., arXiv:2003.00295): without bias correction, eps (tau there) outside the root.

    The variance begins at 0; the paper begins it at eps^2 or more, which damps the first steps where deltas are small.

    >>> sorted(adam(lr=0.1).kinds)
    ['momentum', 'variance']

    Raises ``ValueError`` for a learning rate or an eps that is not positive, or betas outside [0, 1).
    """
    first, second = betas
    checked(lr, first)
    if not 0 <= second < 1:
        raise ValueError(f"betas are {betas!r}; both lie in [0, 1)")
    if not eps > 0:
        raise ValueError(f"eps is {eps!r}; it is positive, usually between 1e-4 and 1e-1")
    return Adam(lr, (first, second), eps)


def checked(lr: float, momentum: float) -> None:
    """Raise ``ValueError`` unless both are in their range."""
    if not lr > 0:
        raise ValueError(f"lr is {lr!r}; an outer learning rate is positive, usually between 0.1 and 1")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum!r}; it lies in [0, 1)")
