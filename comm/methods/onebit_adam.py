"""1-bit Adam (Tang et al., arXiv:2102.02888): after a warm-up the variance is frozen and momenta are sent in one bit.

    warm-up    the inner optimizer's own Adam on the mean gradient, in fp32
    then       m_i = b1 m + (1 - b1) g_i;   m = combined C(m_i), with error feedback
               x -= lr (clip(m / (sqrt(v) + eps), -c, c) + decay x)         v as the warm-up left it

An element without a gradient in the warm-up has v = 0: from then on it is only decayed, since a code of few bits gives
every element a momentum. One with a tiny v would make huge steps: c is the largest step of Adam itself,
max(1, (1 - b1) / sqrt(1 - b2)). Both rules are ours. Embedding rows that first occur after the warm-up are never
trained, so it must be long enough to see what matters.

Feedback around gradients would pass through Adam's variance, which is not linear; momenta are linear. m and v are
divided by Adam's bias corrections of the last warm-up step, a rule of ours, too. From the freeze on the inner optimizer
is not stepped any more; its learning rate is still read in each step.
Communication: the two-phase route of `every_step`; clipping after the freeze has no effect.
Keeps: m and v, equal on all replicas, and the feedback's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.compressors.sign import sign
from dtrain.comm.feedback import error_feedback
from dtrain.comm.layout import Named, is_keepable, working
from dtrain.comm.methods.every_step import VERIFY_STEPS, EveryStep, ExchangedGradients, context_of, every_step
from dtrain.comm.ops import Flow
from dtrain.comm.pieces import Exchange, Pieces, Repeated
from dtrain.comm.plans.plan import Compress, after
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.method import Method, Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind

READ = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class OneBitAdam(Sync):
    """See `onebit_adam`."""

    warmup_steps: int
    exchange: EveryStep

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        self.require_inner(pieces.optimizer)
        moments: dict[str, Kind] = {"adam_m": "replicated", "adam_v": "replicated"}
        context = context_of("onebit_adam", self.exchange, pieces, seed, moments)
        return Attached(context, _FrozenAdam(self, context))

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for another inner optimizer than Adam or AdamW with the same settings everywhere."""
        groups = optimizer.param_groups
        if not all("betas" in group and "eps" in group for group in groups) or "Adam" not in type(optimizer).__name__:
            raise ValueError(f"onebit_adam freezes Adam's variance; the inner optimizer is {type(optimizer).__name__}")
        if any(group.get("amsgrad") or group.get("maximize") for group in groups):
            raise ValueError("onebit_adam does not know amsgrad and maximize; leave them off")
        if any(group[name] != groups[0][name] for group in groups for name in READ):
            raise ValueError(f"the parameter groups differ in one of {', '.join(READ)}; onebit_adam has one of each")
        decoupled = "AdamW" in type(optimizer).__name__ or groups[0].get("decoupled_weight_decay", False)
        if groups[0]["weight_decay"] and not decoupled:
            raise ValueError("onebit_adam knows decoupled weight decay only; use AdamW, or weight_decay=0")


class _FrozenAdam(Method):
    """A `OneBitAdam` at work: it exchanges gradients in the warm-up, momenta afterwards."""

    def __init__(self, spec: OneBitAdam, context: Context) -> None:
        self.context, self.warmup_steps = context, spec.warmup_steps
        self._gradients = ExchangedGradients(spec.exchange, context, self._combining)

    @property
    def frozen(self) -> bool:
        """Whether the warm-up is over."""
        return self.context.steps >= self.warmup_steps

    @property
    def exchange(self) -> Exchange:
        return _Joined(self._gradients.exchange, self._require_variance)

    def prepare(self) -> bool:
        return self._gradients.prepare()

    def skip(self) -> None:
        self._gradients.skip()

    def weigh(self, tokens: int) -> None:
        self._gradients.weigh(tokens)

    def verify(self) -> bool:
        return self._gradients.verify()

    def advance(self) -> None:
        if not self.frozen:
            self._gradients.advance()
            return
        pieces, state, group = self.context.pieces, self.context.state, self._group
        unused = set(pieces.unused())
        b1, b2 = group["betas"]
        largest = max(1.0, (1 - b1) / math.sqrt(1 - b2))
        moved = {}
        for fqn, now in pieces.read().items():
            m, v = state.get(fqn, "adam_m", now), state.get(fqn, "adam_v", now)
            along = torch.where(v > 0, m / (v.sqrt() + group["eps"]), 0.0).clamp_(-largest, largest)
            step = along + group["weight_decay"] * now
            moved[fqn] = now if fqn in unused else now - float(group["lr"]) * step
        pieces.skip()
        pieces.write(moved)

    def after_step(self) -> None:
        self._gradients.after_step()
        if self.context.steps == self.warmup_steps:
            self._freeze()

    def _combining(self, gradients: Named, key: Key, present: bool | None) -> Flow[Combined]:
        if not self.frozen:
            mean = yield from self._gradients.combining(gradients, key, present)
            # Larger gradients would leave no finite variance to freeze.
            return replace(mean, finite=mean.finite and is_keepable(*mean.values.values()))
        b1, state = self._group["betas"][0], self.context.state
        last = {fqn: state.get(fqn, "adam_m", gradient) for fqn, gradient in gradients.items()}
        momenta = {
            fqn: (last[fqn] if state.begun(fqn, "adam_m") else b1 * last[fqn]) + (1 - b1) * working(gradient)
            for fqn, gradient in gradients.items()
        }
        combined = yield from self._gradients.combining(momenta, key, present)
        for fqn, momentum in combined.values.items():
            state.stage(fqn, "adam_m", momentum.clone())
        new = {fqn: m - last[fqn] if key.again else m for fqn, m in combined.values.items()}  # gradients add up
        return replace(combined, values={fqn: m.to(gradients[fqn].dtype) for fqn, m in new.items()})

    def _require_variance(self) -> None:
        """Raise ``RuntimeError`` for a rank that runs out of data in the warm-up."""
        if not self.frozen:
            raise RuntimeError(
                f"this rank has ended (model.join()) in step {self.context.steps}, within the {self.warmup_steps} "
                "steps of 1-bit Adam's warm-up: its Adam is not stepped any more, so its variance would be frozen at "
                "other values; give all ranks that many batches, or end the warm-up earlier"
            )

    def _freeze(self) -> None:
        """Take over Adam's moments, divided by their bias corrections."""
        b1, b2 = self._group["betas"]
        inner_state = self.context.pieces.optimizer_state()
        moments = inner_state.get("exp_avg", {})
        if without := self.context.pieces.segments.keys() - moments.keys():
            raise RuntimeError(
                f"the inner optimizer has no variance of {', '.join(sorted(without)[:3])} after {self.context.steps} "
                "steps of warm-up; onebit_adam needs every parameter in use, and at least one step that was not skipped"
            )
        for fqn, m in moments.items():
            steps = float(inner_state["step"][fqn]) if "step" in inner_state else float(self.context.steps)
            self.context.state.stage(fqn, "adam_m", working(m) / (1 - b1**steps))
            self.context.state.stage(fqn, "adam_v", working(inner_state["exp_avg_sq"][fqn]) / (1 - b2**steps))
        self.context.state.commit()

    @property
    def _group(self) -> dict[str, Any]:
        return self.context.pieces.optimizer.param_groups[0]


@dataclass(frozen=True)
class _Joined:
    """An exchange, and a check for where a rank has run out of data (``model.join()``); see `Repeated`."""

    exchange: Repeated
    require: Callable[[], None]

    @property
    def adds(self) -> bool:
        return self.exchange.adds

    def __call__(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        return self.exchange(gradients, present)

    def stood_in(self) -> None:
        self.require()
        self.exchange.stood_in()


def onebit_adam(
    warmup_steps: int, *, compress: Compress = None, verify_every: int = VERIFY_STEPS, tie: Tie = "stop"
) -> OneBitAdam:
    """1-bit Adam.

    Args:
        warmup_steps: steps of plain Adam in fp32; 15 to 25 % of a run, until the variance is stable.
        compress: a compressor for the momenta afterwards; ``error_feedback(sign())`` by default.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `every_step`.

    Raises ``ValueError`` for a warm-up of no steps, and when attached to another optimizer than Adam or AdamW.
    Source: arXiv:2102.02888, algorithm 1.
    """
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 1:
        raise ValueError(f"warmup_steps is {warmup_steps!r}; the variance needs at least one step to be frozen")
    for_momenta = error_feedback(sign()) if compress is None else compress
    exchange = every_step(compress=after(warmup_steps, for_momenta), verify_every=verify_every, tie=tie)
    return OneBitAdam(warmup_steps, exchange)
