"""CO2 (Sun et al., ICLR 2024, arXiv:2401.16265): local steps, averaged one round late with full overlap.

    m <- clip(momentum m + D / gap, -limit, limit);   anchor <- anchor - lr m     D: mean pseudo-gradient, a round old

`local_update` with ``delay="stale"``, outer heavy ball, clipped momentum, and a penalty for the gap between the anchor
that D was measured from and the one it is applied to. Without penalty and clip it is delayed DiLoCo with heavy ball;
without the delay as well, SlowMo at a constant learning rate.

The paper's formula for the gap could not be checked. Ours follows its idea, gap-aware staleness (Barkai et al.): how
far the anchor has moved since, relative to how far the inner optimizer may move an element in a round,

    gap = 1 + |anchor now - anchor then| / (inner lr x H)           elementwise, for inner optimizers such as Adam

or a number, or the user's own function.
Communication and bytes: one parameter exchange every H steps, overlapped with the whole next round.
Keeps: the anchor and the momentum; with another penalty than this gap, or without momentum, also the last anchor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from dtrain.comm.kernels import kernel
from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.comm.outer_optimizers import (
    PLAIN,
    Momentum,
    OuterOptimizer,
    Round,
    in_one_pass,
    momentum_step,
    sgd,
    writable,
)
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS
from dtrain.comm.runtime.round_lengths import EverySteps
from dtrain.comm.state import Kind, State

Gap: TypeAlias = Callable[[Tensor, Tensor, Round], Tensor]
"""(anchor [n], last anchor [n], the round) -> the divisor, [n] or 0-dim, at least 1. Equal on all ranks."""


def gap_aware(anchor: Tensor, last_anchor: Tensor, now: Round) -> Tensor:
    """The gap in the module's formula; 1 where the inner learning rate is 0."""
    reach = now.inner_lr * now.every_steps
    return (anchor - last_anchor).abs_().div_(reach).add_(1) if reach > 0 else anchor.new_ones(())


@dataclass(frozen=True)
class Constant:
    """The same penalty everywhere and always."""

    value: float

    def __call__(self, anchor: Tensor, last_anchor: Tensor, now: Round) -> Tensor:
        return anchor.new_full((), self.value)


@dataclass(frozen=True)
class Penalized:
    """``outer`` along pseudo-gradients divided by their gap."""

    outer: OuterOptimizer
    gap: Gap

    @property
    def kinds(self) -> dict[str, Kind]:
        return {**self.outer.kinds, "then": "replicated"}

    @property
    def uses_inner_lr(self) -> bool:
        return self.gap is gap_aware

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        last_anchor = state.find(fqn, "then")
        last_anchor = anchor if last_anchor is None else last_anchor
        state.stage(fqn, "then", anchor)
        return self.outer.step(fqn, anchor, delta / self.gap(anchor, last_anchor, now), state, now)


@kernel
def gap_aware_step(
    delta: Tensor, reach: Tensor, anchor: Tensor, momentum: Tensor,
    *, lr: float, factor: float, nesterov: bool, clip: float | None,
) -> None:  # fmt: skip
    """`momentum_step` along delta / `gap_aware`; ``reach`` [1, 1, 1] is inner lr times H."""
    gap = (lr * momentum).abs_().div_(reach).add_(1)
    momentum_step.function(delta / gap, anchor, momentum, lr=lr, factor=factor, nesterov=nesterov, clip=clip)


@dataclass(frozen=True)
class GapAware:
    """`Penalized` by `gap_aware` around a heavy ball: the anchor has moved by lr times the momentum.

    So no last anchor is kept, and a step is one pass over memory.
    """

    outer: Momentum

    @property
    def kinds(self) -> dict[str, Kind]:
        return self.outer.kinds

    @property
    def uses_inner_lr(self) -> bool:
        return True

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        return self._moved(fqn, anchor.clone(), delta, state, now, copy=True)

    def step_(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        return self._moved(fqn, anchor, delta, state, now, copy=False)

    def _moved(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round, *, copy: bool) -> Tensor:
        momentum, reach = writable(state, fqn, "momentum", anchor, copy=copy), now.inner_lr * now.every_steps
        flat, constants = (delta, anchor, momentum), self.outer.constants
        if reach > 0:
            in_one_pass(gap_aware_step, flat, anchor.new_full((1, 1, 1), reach), constants=constants)
        else:
            in_one_pass(momentum_step, flat, constants=constants)
        return anchor


def co2(
    *,
    every_steps: EverySteps = 12,
    lr: float = 1.0,
    momentum: float = 0.2,
    gap: Literal["gap_aware", "none"] | float | Gap = "gap_aware",
    clip: float | None = 1.0,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> LocalUpdate:
    """CO2.

    Args:
        every_steps: tau, inner steps in a round, which hide an exchange that takes no longer; "auto": as many as that
            takes, see `knobs`; or rounds of changing length, see `dtrain.rounds`.
        lr: the outer learning rate.
        momentum: of the outer heavy ball, in [0, 1).
        gap: the penalty for staleness: "gap_aware", "none", a number of at least 1, or a rule.
        clip: bound on the absolute value of the outer momentum's elements, or None.
        compress: a compressor for the pseudo-gradients, ``error_feedback(...)`` of one, or None for fp32.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> co2().delay
    'stale'

    Raises ``ValueError`` for numbers outside their range or an unknown gap. Source: arXiv:2401.16265.
    """
    heavy_ball = sgd(lr=lr, momentum=momentum, clip=clip)
    rule = _rule(gap)
    outer: OuterOptimizer = heavy_ball if rule is None else Penalized(heavy_ball, rule)
    if rule is gap_aware and momentum:
        outer = GapAware(heavy_ball)
    return local_update(
        every_steps=every_steps, outer=outer, compress=compress, delay="stale", verify_every=verify_every, tie=tie
    )


def _rule(gap: object) -> Gap | None:
    if gap == "none":
        return None
    if gap == "gap_aware":
        return gap_aware
    if isinstance(gap, int | float) and not isinstance(gap, bool) and gap >= 1:
        return Constant(float(gap))
    if callable(gap):
        rule: Gap = gap
        return rule
    raise ValueError(f"gap is {gap!r}; choose 'gap_aware', 'none', a number of at least 1, or give a function")
