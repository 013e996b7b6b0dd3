"""EF21-W (Richtarik, Gasanov and Burlachenko, ICLR 2024): EF21 with larger scales for replicas of rougher losses.

    s_i = L_i / mean_j L_j;    send C_i(d) = s_i C(d / s_i)   where EF21 sends   C(d)

L_i: the smoothness of replica i's loss, here the sum over the warm-up of |g_i(t+1) - g_i(t)|: all replicas make the
same steps, so their lengths cancel. After the warm-up s_i never changes. The second phase of the two-phase route, whose
input is a mean, is not scaled. Where C is homogeneous (top-k, sign, ...) C_i is C, and this is EF21: the paper's gain
is then one of theory, a larger safe step size.
Communication: in the warm-up one gather over the shards in each exchange, at its end one over the replicas; then 4 more
bytes in each encoded row. Keeps: what EF21 keeps, in the warm-up the last gradient too, and two numbers. A run that
is resumed on another mesh takes replica 0's scale on all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import Compressor, two_rounds, union
from dtrain.comm.feedback import EF21, Compression, Feedback, ef21
from dtrain.comm.layout import Matrix
from dtrain.comm.ops import AllGather, Flow, Payload
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, Numbers, State


@dataclass(frozen=True)
class Scaled:
    """``C(x / scale) scale``, the scale sent along; in the second phase of a route, C alone."""

    compressor: Compressor
    scale: float = 1.0

    @property
    def unbiased(self) -> bool:
        return self.compressor.unbiased

    @property
    def delta(self) -> float:
        return self.compressor.delta

    @property
    def homogeneous(self) -> bool:
        return self.compressor.homogeneous

    @property
    def linear(self) -> bool:
        return False

    def encode(self, rows: Tensor, key: Key) -> Payload:
        scale = rows.new_full((rows.shape[0], 1), 1.0 if key.second_phase else self.scale)
        return (*self.compressor.encode(rows / scale, key), scale)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        return self.compressor.decode(payload[:-1], width, key) * payload[-1]

    def row_bytes(self, width: int) -> int:
        return self.compressor.row_bytes(width) + 4

    def union(self, ranks: int) -> Scaled | None:
        """See `Sparse`."""
        wider = union(self.compressor, ranks)
        return None if wider is None else replace(self, compressor=wider)


@dataclass(frozen=True)
class _EF21W(Feedback):
    """EF21, which also keeps the last gradient while it is ``learning``."""

    eta: float
    learning: bool = True

    @property
    def ef21(self) -> EF21:
        return EF21(self.eta)

    @property
    def kinds(self) -> dict[str, Kind]:
        return {**self.ef21.kinds, "last_gradient": "per_worker"}

    def correct(self, fqn: str, value: Tensor, state: State) -> Tensor:
        if self.learning:
            state.stage(fqn, "last_gradient", value.clone())
        else:
            state.drop(fqn, "last_gradient")
        return self.ef21.correct(fqn, value, state)

    def fresh(self, fqn: str, value: Tensor, state: State) -> Tensor:
        """How far the gradient has moved; zeros in the first step."""
        last = state.find(fqn, "last_gradient")
        return 0 * value if last is None else value - last

    def retain(self, fqn: str, value: Tensor, corrected: Tensor, sent: Tensor, state: State) -> None:
        self.ef21.retain(fqn, value, corrected, sent, state)

    def retain_owned(self, fqn: str, error: Tensor, start: int, divisor: float, state: State) -> None:
        self.ef21.retain_owned(fqn, error, start, divisor, state)

    def result(self, fqn: str, combined: Tensor, state: State) -> Tensor:
        return self.ef21.result(fqn, combined, state)


@dataclass(frozen=True)
class EF21W:
    """See `ef21w`."""

    compressor: Compressor
    warmup: int

    @property
    def compressions(self) -> tuple[Compression, ...]:
        return (self.learning,)

    @property
    def learning(self) -> Compression:
        """The compression in the warm-up."""
        return Compression(Scaled(self.compressor), _EF21W(1.0))

    def of(self, fqn: str, step: int) -> Compression:
        return self.learning

    def begin(self, fqns: Sequence[str]) -> ChoosingEF21W:
        return ChoosingEF21W(self)


class ChoosingEF21W:
    """EF21-W at work on one rank: this replica's smoothness, then its scale."""

    settled = False

    def __init__(self, spec: EF21W) -> None:
        self.spec = spec
        self.compressions = spec.compressions
        self.exchanges = 0
        self.smoothness = 0.0
        self.scale = 1.0
        self.kinds: dict[str, Kind] = {}
        self._square = 0.0

    @property
    def changes(self) -> int:
        return int(self.exchanges >= self.spec.warmup)

    def of(self, fqn: str, step: int) -> Compression:
        if self.due():
            return self.spec.learning
        return Compression(Scaled(self.spec.compressor, self.scale), _EF21W(1.0, learning=False))

    def accumulate(self, fqn: str, value: Tensor, state: State) -> None:
        """Nothing: its feedback keeps the last gradient."""

    def due(self) -> bool:
        return self.exchanges < self.spec.warmup

    def measure(self, fqn: str, fresh: Tensor, corrected: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        self._square += float(fresh.double().square().sum())

    def review(self, state: State, rate: float) -> Flow[None]:
        if not self.due():
            return
        square, self._square = torch.tensor([self._square], dtype=torch.float64), 0.0
        (squares,) = yield AllGather((square,), axis="shard")
        moved = float(squares.sum().sqrt())
        if moved < float("inf"):  # otherwise the step is skipped, too
            self.smoothness += moved
        self.exchanges += 1
        if self.due():
            return
        (smoothnesses,) = yield AllGather((torch.tensor([self.smoothness], dtype=torch.float64),), axis="replicate")
        mean = float(smoothnesses.mean())
        self.scale = self.smoothness / mean if self.smoothness > 0 else 1.0

    def numbers(self) -> Numbers:
        return {
            "plan.exchanges": self.exchanges,
            "plan.smoothness": self.smoothness,
            "plan.scale": self.scale,
        }

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.exchanges = int(numbers["plan.exchanges"])
        self.smoothness, self.scale = float(numbers["plan.smoothness"]), float(numbers["plan.scale"])

    def table(self) -> str:
        return f"EF21-W: scale of this replica {self.scale:.4g}"


def ef21w(compressor: Compressor, *, warmup_steps: int = 100) -> EF21W:
    """EF21 with a scale for each replica, from how fast its gradients change, measured in the warm-up.

    Args:
        compressor: a contraction. Where it is homogeneous, the result is that of ``ef21(compressor, eta=1)``.
        warmup_steps: exchanges in which it measures; all scales are 1 meanwhile.

    >>> from dtrain.compress import topk
    >>> from dtrain.plans import ef21w
    >>> sorted(ef21w(topk(0.01)).learning.kinds)
    ['estimate', 'last_gradient', 'mean_estimate']

    Raises ``TypeError`` for low rank, ``ValueError`` for what is not a contraction, or a warm-up without steps.
    """
    if two_rounds(compressor) is not None:
        raise TypeError(f"{compressor} is homogeneous, so weights change nothing; use ef21(...) around it")
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 1:
        raise ValueError(f"warmup_steps is {warmup_steps!r}; give a positive number of exchanges, for example 100")
    ef21(compressor, eta=1)  # raises for what is not a contraction
    return EF21W(compressor, warmup_steps)
