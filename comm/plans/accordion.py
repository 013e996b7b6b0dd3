"""Accordion (Agarwal et al., arXiv:2010.16248): compress less while gradients change fast, and more while they do not.

    a layer is in a critical regime if  | |g_then| - |g_now| | / |g_then|  >= threshold        compared now and then

Norms are of the values of one exchange without the residual, summed over all ranks, so that all decide alike. (The
authors' code takes the norm of the gradient accumulated over an epoch, which is less noisy: with small batches, compare
less often or raise the threshold. The learning rate is not used.) It chooses between two plans; either may be adaptive,
`lgreco` for example, which then chooses by layer.
Before the second comparison, all layers count as critical.
Communication: at each comparison one gather over the shards and one over the replicas. Keeps: a norm and a choice for
each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from dtrain.comm.feedback import Compression
from dtrain.comm.layout import Matrix
from dtrain.comm.ops import AllGather, Axis, Flow
from dtrain.comm.plans.adaptive import Choosing, begun
from dtrain.comm.plans.plan import Compress, Plan, as_plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import Numbers


@dataclass(frozen=True)
class Accordion:
    """See `accordion`."""

    critical: Plan
    otherwise: Plan
    every: int
    threshold: float

    @property
    def compressions(self) -> tuple[Compression, ...]:
        return (*self.critical.compressions, *self.otherwise.compressions)

    def of(self, fqn: str, step: int) -> Compression:
        return self.critical.of(fqn, step)

    def begin(self, fqns: Sequence[str]) -> ChoosingAccordion:
        return ChoosingAccordion(self, fqns)


class ChoosingAccordion:
    """Accordion at work on one rank."""

    settled = False

    def __init__(self, spec: Accordion, fqns: Sequence[str]) -> None:
        self.spec, self.fqns = spec, list(fqns)
        self.compressions = spec.compressions
        self.plans: tuple[Choosing, Choosing] = (begun(spec.critical, fqns), begun(spec.otherwise, fqns))
        self.norms: dict[str, float] = {}
        self.calm = dict.fromkeys(self.fqns, False)
        self.exchanges = 0
        self.own_changes = 0
        self._squares: dict[str, float] = {}

    @property
    def changes(self) -> int:
        return self.own_changes + sum(plan.changes for plan in self.plans)

    def of(self, fqn: str, step: int) -> Compression:
        return self.plans[self.calm[fqn]].of(fqn, step)

    def due(self) -> bool:
        return self._compares() or any(plan.due() for plan in self.plans)

    def measure(self, fqn: str, fresh: Tensor, corrected: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        self._squares[fqn] = float(fresh.double().square().sum())
        for plan in self.plans:
            if plan.due():
                plan.measure(fqn, fresh, corrected, matrix, world, key)

    def review(self) -> Flow[None]:
        compares, self.exchanges = self._compares(), self.exchanges + 1
        for plan in self.plans:
            yield from plan.review()
        if not compares:
            self._squares = {}
            return
        total = torch.tensor([self._squares.get(fqn, 0.0) for fqn in self.fqns], dtype=torch.float64)
        self._squares = {}
        axes: tuple[Axis, ...] = ("shard", "replicate")
        for axis in axes:
            (rows,) = yield AllGather((total,), axis=axis)
            total = rows.sum(0)
        if bool(torch.isfinite(total).all()):  # otherwise the step that was measured is skipped, too
            self._decide(dict(zip(self.fqns, total.sqrt().tolist(), strict=True)))

    def numbers(self) -> Numbers:
        counters = {"plan.exchanges": self.exchanges, "plan.changes": self.own_changes}
        calm = {f"plan.calm.{fqn}": int(calm) for fqn, calm in self.calm.items()}
        norms = {f"plan.norm.{fqn}": self.norms.get(fqn, -1.0) for fqn in self.fqns}
        return {**counters, **calm, **norms, **dict(chain.from_iterable(self._inner()))}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.exchanges, self.own_changes = int(numbers["plan.exchanges"]), int(numbers["plan.changes"])
        self.calm = {fqn: bool(numbers[f"plan.calm.{fqn}"]) for fqn in self.fqns}
        norms = {fqn: float(numbers[f"plan.norm.{fqn}"]) for fqn in self.fqns}
        self.norms = {fqn: norm for fqn, norm in norms.items() if norm >= 0}
        for number, plan in enumerate(self.plans):
            plan.load_numbers({name: numbers[f"plan.{number}.{name}"] for name in plan.numbers()})

    def table(self) -> str:
        calm = sum(self.calm.values())
        head = f"Accordion: {len(self.fqns) - calm} of {len(self.fqns)} parameters in a critical regime"
        return "\n".join([head, "critical:", self.plans[0].table(), "otherwise:", self.plans[1].table()])

    def _compares(self) -> bool:
        return (self.exchanges + 1) % self.spec.every == 0

    def _decide(self, norms: dict[str, float]) -> None:
        before = dict(self.calm)
        for fqn, norm in norms.items():
            last = self.norms.get(fqn)
            self.calm[fqn] = last is not None and abs(last - norm) < self.spec.threshold * last
        self.norms = norms
        self.own_changes += before != self.calm

    def _inner(self) -> Iterator[list[tuple[str, float]]]:
        for number, plan in enumerate(self.plans):
            yield [(f"plan.{number}.{name}", value) for name, value in plan.numbers().items()]


def accordion(critical: Compress, otherwise: Compress, *, every: int = 100, threshold: float = 0.5) -> Accordion:
    """Two plans, by how fast the gradient of each parameter changes.

    Args:
        critical: the one that loses less, for critical regimes.
        otherwise: the one that sends less.
        every: exchanges between two comparisons; an epoch in the paper.
        threshold: relative change of the norm; 0.5 in the paper.

    >>> from dtrain.compress import error_feedback, powersgd
    >>> from dtrain.plans import lgreco
    >>> accordion(error_feedback(powersgd(8)), lgreco(error_feedback(powersgd(2)))).threshold
    0.5

    Raises ``ValueError`` for values outside their range, ``TypeError`` for no compressor. Source: algorithm 1.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every is {every!r}; give a positive number of exchanges, for example 100")
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold!r}; give a positive relative change, for example 0.5")
    return Accordion(as_plan(critical), as_plan(otherwise), every, float(threshold))
