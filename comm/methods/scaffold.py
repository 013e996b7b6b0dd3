"""FedAvg-M and SCAFFOLD-M (Cheng et al., arXiv:2306.16504): local steps steered by the replicas' mean direction.

    step      parameters_i <- parameters_i - lr (beta (gradient_i - c_i + c) + (1 - beta) g)
    round     d_i = (anchor - parameters_i) / sum(lr);   D = mean_i d_i;   g <- D
              c_i <- mean gradient_i of the round;   c <- mean_i c_i;   anchor <- anchor - outer lr sum(lr) D

FedAvg-M leaves c_i and c at zero; with beta = 1 it is Local SGD, and SCAFFOLD-M is SCAFFOLD (Karimireddy et al.,
arXiv:1910.06378, its option II). For heterogeneous data, on which Local SGD does not reach the optimum.
Every replica takes part in each round and steps by plain SGD, so the mean gradients follow from what is known already:

    mean gradient_i = (d_i - (1 - beta) g) / beta + c_i - c;   c <- (D - (1 - beta) g) / beta

Where d_i is compressed, each replica takes for d_i its contribution to D: what was sent, less the error of a second
phase, or EF21's estimate. c is then the mean of all c_i whatever the error; otherwise every round's error would stay in
c - mean c_i for good.

Communication: one round every H steps. Bytes: of one parameter exchange per round, control variates add none.
Keeps: anchor and g; with control variates c, and c_i of each replica; during a lossy round what was sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.compressors.cast import cast
from dtrain.comm.feedback import Compression, Feedback
from dtrain.comm.layout import Named
from dtrain.comm.methods.local_update import local_update
from dtrain.comm.ops import Flow
from dtrain.comm.outer_optimizers import sgd
from dtrain.comm.plans.plan import WEAK, Compress, Plan, as_plan, with_feedback
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.local_updates import at_work
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, LoopSpec
from dtrain.comm.runtime.method import Sync
from dtrain.comm.runtime.round_lengths import RoundLengths
from dtrain.comm.runtime.step_source import StepSource
from dtrain.comm.state import Kind, Numbers, State

if TYPE_CHECKING:
    from dtrain.comm.pieces import Exchange, Pieces
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.context import Context
    from dtrain.comm.runtime.loop import Parts
    from dtrain.comm.runtime.membership.members import Members
    from dtrain.comm.runtime.rounds import Fragment


@dataclass(frozen=True)
class Noted(Feedback):
    """No feedback, but this replica's contribution to the mean is kept as ``told``; the mean of all is the result."""

    feeds_back: ClassVar[bool] = False

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"told": "per_worker"}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        return value

    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        state.stage(fqn, "told", sent.clone())

    def retain_owned(self, fqn: str, error: Tensor, start: int, divisor: float, state: State) -> None:
        state.staged(fqn, "told")[start : start + error.numel()] -= divisor * error


def noted(compression: Compression) -> Compression:
    """``compression``, with `Noted` where it loses something and has no feedback."""
    exact = compression.compressor == cast("fp32") or compression.feedback.feeds_back
    return compression if exact else dataclasses.replace(compression, feedback=Noted())


@dataclass(frozen=True)
class Directed(LoopSpec, Sync):
    """See `fedavg_m` and `scaffold_m`. ``control``: whether there are control variates."""

    beta: float = 1.0
    control: bool = False

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        self.require_inner(pieces.optimizer)
        return at_work(self, pieces, seed, name="scaffold_m", settings=("beta", "control"), change=self._direct)

    def bind_members(self, pieces: Pieces, seed: int, members: Members) -> Attached:
        raise ValueError(
            f"replicas cannot come and go with {'scaffold_m' if self.control else 'fedavg_m'}: every replica takes "
            "part in each round, whose mean direction the next one's steps go along; take diloco(...)"
        )

    def _direct(self, context: Context, parts: Parts) -> None:
        parts.source = DirectedGradients(self, context)

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for another inner optimizer than plain SGD."""
        groups = optimizer.param_groups
        settings = {name: {group.get(name) for group in groups} for name in ("lr", "momentum", "weight_decay")}
        plain = isinstance(optimizer, torch.optim.SGD) and not any({*settings["momentum"], *settings["weight_decay"]})
        if not plain or len(settings["lr"]) > 1:
            described = ", ".join(
                f"{name}={' and '.join(map(str, values))}" for name, values in settings.items() if values != {None}
            )
            raise ValueError(
                f"{'scaffold_m' if self.control else 'fedavg_m'} steps by plain SGD, whose gradients follow from how "
                "far it moved; take torch.optim.SGD(lr=...) without momentum and weight decay and with one rate, not "
                f"{type(optimizer).__name__}({described})"
            )

    @property
    def kinds(self) -> dict[str, Kind]:
        variates: dict[str, Kind] = {"control": "replicated", "own_control": "per_worker"} if self.control else {}
        return {**super().kinds, "direction": "replicated", **variates}

    @property
    def weighs(self) -> bool:
        return False  # c is the mean of all c_i only where all weigh the same


class DirectedGradients(StepSource):
    """The steps of a `Directed`. ``moved``: the sum of the learning rates of this round's steps."""

    def __init__(self, spec: Directed, context: Context) -> None:
        self._spec, self._context = spec, context
        self.moved = 0.0
        self._deltas: dict[str, Tensor] = {}
        self._met: set[str] = set()  # parameters whose gradients this step has directed

    @property
    def exchange(self) -> Exchange:
        return _Directing(self)

    def exchanged(self) -> bool:
        self._met = set()
        return True

    def stepped(self) -> None:
        self.moved += self._context.rate  # also in a step that this replica skips: all must divide by the same

    def captured(self, values: Named) -> None:
        self._deltas = dict(values)

    def applying(self, fragment: Fragment, mean: Named | None) -> None:
        beta, state = self._spec.beta, self._context.state
        for fqn, delta in (mean or {}).items() if self.moved else ():  # without a step there is no pseudo-gradient
            direction, last = delta / self.moved, state.get(fqn, "direction", delta)
            if self._spec.control:
                control, own_control = state.get(fqn, "control", delta), state.get(fqn, "own_control", delta)
                gradient = (self._contribution(fqn) / self.moved - (1 - beta) * last) / beta
                state.stage(fqn, "own_control", gradient + own_control - control)
                state.stage(fqn, "control", (direction - (1 - beta) * last) / beta)
            state.stage(fqn, "direction", direction)
        self.moved, self._deltas = 0.0, {}

    def numbers(self) -> Numbers:
        return {"moved": self.moved}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.moved = float(numbers["moved"])

    def directed(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        """What the optimizer steps with in place of this replica's own gradients; nothing is sent."""
        yield from ()
        beta, state, directed = self._spec.beta, self._context.state, {}
        for fqn, gradient in gradients.items():
            corrected = gradient
            if fqn in self._met:  # a further backward pass: the direction is added once a step
                directed[fqn] = beta * corrected
                continue
            self._met.add(fqn)
            if self._spec.control:
                corrected = gradient + (state.get(fqn, "control", gradient) - state.get(fqn, "own_control", gradient))
            direction = state.get(fqn, "direction", gradient)
            directed[fqn] = corrected if beta == 1 else beta * corrected + (1 - beta) * direction
        return Combined(directed, finite=True, present=None)

    def _contribution(self, fqn: str) -> Tensor:
        """This replica's part of the round's mean."""
        context = self._context
        kinds = context.plan.of(fqn, context.steps).feedback.kinds
        name = next((name for name in ("told", "estimate") if name in kinds), "")
        sent = context.state.find(fqn, name)
        context.state.drop(fqn, "told")
        return self._deltas[fqn] if sent is None else sent  # None: it was sent in full


@dataclass(frozen=True)
class _Directing:
    """The exchange that the pieces call: see `Repeated` and `Private`."""

    source: DirectedGradients
    adds: bool = True
    private: bool = True

    def __call__(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        return self.source.directed(gradients, present)

    def stood_in(self) -> None:
        """Nothing: it sends nothing."""


def fedavg_m(
    *,
    every_steps: int | RoundLengths = 10,
    beta: float = 0.1,
    lr: float = 1.0,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> Directed:
    """FedAvg-M: each local step goes along the last round's mean direction, too.

    Args:
        every_steps: inner steps in a round, or rounds of changing length, see `dtrain.rounds`.
        beta: the weight of this replica's own gradient, in (0, 1]; 1 is Local SGD.
        lr: the outer learning rate, relative to the mean of what the replicas moved.
        compress: a compressor for the pseudo-gradients, ``error_feedback(...)`` of one, or None for fp32.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> fedavg_m(beta=0.5).beta
    0.5

    Raises ``ValueError`` for numbers outside their range, and when attached to another optimizer than plain SGD.
    Source: arXiv:2306.16504.
    """
    loop = _loop(every_steps, lr, as_plan(compress), verify_every, tie)
    return _directed(loop, beta, control=False)


def scaffold_m(
    *,
    every_steps: int | RoundLengths = 10,
    beta: float = 1.0,
    lr: float = 1.0,
    compress: Compress = None,
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> Directed:
    """SCAFFOLD-M: local steps that are corrected by how this replica's gradients differ from all replicas'.

    Args: those of `fedavg_m`; with ``beta=1`` it is SCAFFOLD.

    >>> scaffold_m().control
    True

    Raises ``ValueError`` as `fedavg_m` does, and for EF21 or EControl around a compressor that loses more than half.
    Source: arXiv:2306.16504, arXiv:1910.06378.
    """
    plan = as_plan(compress)
    _require_stable(plan)
    loop = _loop(every_steps, lr, with_feedback(plan, noted), verify_every, tie)
    return _directed(loop, beta, control=True)


def _require_stable(plan: Plan) -> None:
    """Raise ``ValueError`` for a running estimate that lags: the control variates, which follow it, would diverge."""
    for compression in plan.compressions:
        weak = compression.by_row is None or compression.by_row.delta < WEAK
        if weak and "estimate" in compression.feedback.kinds:
            raise ValueError(
                f"scaffold_m diverges where a running estimate (ef21, ef21w, econtrol) follows its deltas through "
                f"{compression.compressor}, which may lose more than half of them; use error_feedback(...) around "
                "it, or none"
            )


def _loop(every_steps: int | RoundLengths, lr: float, plan: Plan, verify_every: int, tie: Tie) -> LoopSpec:
    if not isinstance(every_steps, int | RoundLengths):
        raise ValueError(f"every_steps is {every_steps!r}; give a whole number of steps, or rounds of dtrain.rounds")
    return local_update(every_steps=every_steps, outer=sgd(lr=lr), compress=plan, verify_every=verify_every, tie=tie)


def _directed(loop: LoopSpec, beta: float, *, control: bool) -> Directed:
    if not 0 < beta <= 1:
        raise ValueError(f"beta is {beta!r}; the weight of a replica's own gradient lies in (0, 1]")
    fields = {field.name: getattr(loop, field.name) for field in dataclasses.fields(loop)}
    return Directed(**fields, beta=float(beta), control=control)
