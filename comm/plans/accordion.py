"""Accordion (Agarwal et al., arXiv:2010.16248): compress less while gradients change fast, and more while they do not.

    G = sum of g over the last exchanges before a comparison
    a layer is in a critical regime if  | |G_then| - |G_now| | / |G_then|  >= threshold        compared now and then
    all layers are, if the learning rate has fallen by that much

g is what a replica gives to the exchange, without a residual; the squares of all ranks' norms |G| are summed, so that
all decide alike. The authors' code compares in every tenth epoch, by G of that epoch on rank 0. There any fall of the
learning rate counts, as its schedules are of steps, and at once; here a smooth schedule, which falls all the time, does
not count, and a step counts at the next comparison. Before the second comparison all layers are critical.
It chooses between two plans; either may be adaptive, `lgreco` for example, which then chooses by layer.
Communication: at each comparison one gather over the shards and one over the replicas. Keeps: G, one fp32 number for
each element, per replica; a norm and a choice for each layer, and the learning rate.
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
from dtrain.comm.state import Kind, Numbers, State


@dataclass(frozen=True)
class Accordion:
    """See `accordion`."""

    critical: Plan
    otherwise: Plan
    every: int
    threshold: float
    accumulate: int

    @property
    def kinds(self) -> dict[str, Kind]:
        return {"accumulated": "per_worker"}

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
        self.compressions, self.kinds = spec.compressions, spec.kinds
        self.plans: tuple[Choosing, Choosing] = (begun(spec.critical, fqns), begun(spec.otherwise, fqns))
        self.norms: dict[str, float] = {}  # at the last comparison
        self.rate = 0.0
        self.calm = dict.fromkeys(self.fqns, False)
        self.exchanges = 0
        self.own_changes = 0

    @property
    def changes(self) -> int:
        return self.own_changes + sum(plan.changes for plan in self.plans)

    def of(self, fqn: str, step: int) -> Compression:
        return self.plans[self.calm[fqn]].of(fqn, step)

    def accumulate(self, fqn: str, value: Tensor, state: State) -> None:
        if self.exchanges % self.spec.every >= self.spec.every - self.spec.accumulate:
            state.stage(fqn, "accumulated", state.get(fqn, "accumulated", value) + value)

    def due(self) -> bool:
        return any(plan.due() for plan in self.plans)

    def measure(self, fqn: str, fresh: Tensor, corrected: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        for plan in self.plans:
            if plan.due():
                plan.measure(fqn, fresh, corrected, matrix, world, key)

    def review(self, state: State, rate: float) -> Flow[None]:
        for plan in self.plans:
            yield from plan.review(state, rate)
        self.exchanges += 1
        if self.exchanges % self.spec.every:
            return
        sums = (state.tensors.get(fqn, {}).get("accumulated") for fqn in self.fqns)
        squares = torch.tensor(
            [0.0 if total is None else float(total.double().square().sum()) for total in sums], dtype=torch.float64
        )
        for fqn in self.fqns:
            state.drop(fqn, "accumulated")
        rates = torch.tensor([rate], dtype=torch.float64)
        axes: tuple[Axis, ...] = ("shard", "replicate")
        for axis in axes:
            rows, all_rates = yield AllGather((squares, rates), axis=axis)
            squares, rates = rows.sum(0), all_rates.amax(0)
        if bool(torch.isfinite(squares).all()):  # a sum of large gradients may overflow
            self._decide(dict(zip(self.fqns, squares.sqrt().tolist(), strict=True)), float(rates))

    def numbers(self) -> Numbers:
        counters = {"plan.exchanges": self.exchanges, "plan.changes": self.own_changes, "plan.rate": self.rate}
        calm = {f"plan.calm.{fqn}": int(calm) for fqn, calm in self.calm.items()}
        norms = {f"plan.norm.{fqn}": self.norms.get(fqn, -1.0) for fqn in self.fqns}
        return {**counters, **calm, **norms, **dict(chain.from_iterable(self._inner()))}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.exchanges, self.own_changes = int(numbers["plan.exchanges"]), int(numbers["plan.changes"])
        self.rate = float(numbers.get("plan.rate", 0.0))  # 0: in states of earlier revisions, which do not have it
        self.calm = {fqn: bool(numbers[f"plan.calm.{fqn}"]) for fqn in self.fqns}
        norms = {fqn: float(numbers[f"plan.norm.{fqn}"]) for fqn in self.fqns}
        self.norms = {fqn: norm for fqn, norm in norms.items() if norm >= 0}
        for number, plan in enumerate(self.plans):
            plan.load_numbers({name: numbers[f"plan.{number}.{name}"] for name in plan.numbers()})

    def table(self) -> str:
        calm = sum(self.calm.values())
        head = f"Accordion: {len(self.fqns) - calm} of {len(self.fqns)} parameters in a critical regime"
        return "\n".join([head, "critical:", self.plans[0].table(), "otherwise:", self.plans[1].table()])

    def _decide(self, norms: dict[str, float], rate: float) -> None:
        before, share = dict(self.calm), 1 - self.spec.threshold
        decayed = rate < share * self.rate
        for fqn, norm in norms.items():
            last = self.norms.get(fqn)
            self.calm[fqn] = not decayed and last is not None and abs(last - norm) < self.spec.threshold * last
        self.norms, self.rate = norms, rate
        self.own_changes += before != self.calm

    def _inner(self) -> Iterator[list[tuple[str, float]]]:
        for number, plan in enumerate(self.plans):
            yield [(f"plan.{number}.{name}", value) for name, value in plan.numbers().items()]


def accordion(
    critical: Compress, otherwise: Compress, *, every: int = 100, threshold: float = 0.5, accumulate: int | None = None
) -> Accordion:
    """Two plans, by how fast the gradient of each parameter changes.

    Args:
        critical: the one that loses less, for critical regimes.
        otherwise: the one that sends less.
        every: exchanges between two comparisons; ten epochs in the authors' code.
        threshold: relative change of the norm; 0.5 in the paper. The same fall of the learning rate between two
            comparisons makes all regimes critical.
        accumulate: exchanges before a comparison whose gradients are summed, at most ``every``, all of these by
            default; an epoch in the paper. The norm of few small batches is mostly noise.

    >>> from dtrain.compress import error_feedback, powersgd
    >>> from dtrain.plans import lgreco
    >>> accordion(error_feedback(powersgd(8)), lgreco(error_feedback(powersgd(2)))).threshold
    0.5

    Raises ``ValueError`` for values outside their range and for one accordion within another, ``TypeError`` for no
    compressor. Source: algorithm 1.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every is {every!r}; give a positive number of exchanges, for example 100")
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold!r}; give a positive relative change, for example 0.5")
    summed = every if accumulate is None else accumulate
    if not isinstance(summed, int) or isinstance(summed, bool) or not 1 <= summed <= every:
        raise ValueError(f"accumulate is {accumulate!r}; give a number of exchanges from 1 to every ({every}), or None")
    plans = as_plan(critical), as_plan(otherwise)
    if any(isinstance(plan, Accordion) for plan in plans):
        raise ValueError("accordion cannot be within another, as both would sum gradients; give lgreco or a fixed plan")
    return Accordion(*plans, every, float(threshold), summed)
