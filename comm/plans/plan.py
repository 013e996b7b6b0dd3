"""What a plan is, and the two plans that do not adapt: by parameter name, and by step."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Protocol, TypeAlias, runtime_checkable

from dtrain.comm.compressors.compressor import AnyCompressor
from dtrain.comm.feedback import Compression, as_compression
from dtrain.comm.state import Kind

WEAK = 0.5
"""Contraction below which a compressor may lose more than half of a value's square in a step."""


@runtime_checkable
class Plan(Protocol):
    """Which compression each parameter gets. The same answers on every rank."""

    @property
    def compressions(self) -> tuple[Compression, ...]:
        """Every compression that it may ever choose."""

    def of(self, fqn: str, step: int) -> Compression:
        """The compression of parameter ``fqn`` in step ``step``."""


Compress: TypeAlias = AnyCompressor | Compression | Plan | None
"""What users may pass as ``compress``."""


@dataclass(frozen=True)
class ByLayer:
    """See `by_layer`."""

    rules: tuple[tuple[str, Plan], ...]
    default: Plan

    def __post_init__(self) -> None:
        _require_static(*(plan for _, plan in self.rules), self.default)

    @property
    def compressions(self) -> tuple[Compression, ...]:
        plans = (*(plan for _, plan in self.rules), self.default)
        return tuple(compression for plan in plans for compression in plan.compressions)

    def of(self, fqn: str, step: int) -> Compression:
        for pattern, plan in self.rules:
            if fnmatch.fnmatchcase(fqn, pattern):
                return plan.of(fqn, step)
        return self.default.of(fqn, step)

    def unmatched(self, fqns: Collection[str]) -> list[str]:
        patterns = [pattern for pattern, _ in self.rules if not fnmatch.filter(fqns, pattern)]
        plans = (*(plan for _, plan in self.rules), self.default)
        return patterns + [pattern for plan in plans for pattern in unmatched(plan, fqns)]


@dataclass(frozen=True)
class After:
    """See `after`."""

    step: int
    then: Plan
    before: Plan

    def __post_init__(self) -> None:
        _require_static(self.then, self.before)

    @property
    def compressions(self) -> tuple[Compression, ...]:
        return (*self.before.compressions, *self.then.compressions)

    def of(self, fqn: str, step: int) -> Compression:
        return (self.then if step >= self.step else self.before).of(fqn, step)

    def unmatched(self, fqns: Collection[str]) -> list[str]:
        return unmatched(self.before, fqns) + unmatched(self.then, fqns)


def _require_static(*plans: Plan) -> None:
    """Raise ``ValueError`` for an adaptive plan: within another one it would never be begun."""
    for plan in plans:
        if hasattr(plan, "begin"):
            raise ValueError(
                f"{type(plan).__name__} learns from what it compresses, which it cannot within by_layer, after or "
                "onebit_adam; give it alone, or to accordion"
            )


def unmatched(plan: Plan, fqns: Collection[str]) -> list[str]:
    """The patterns of `by_layer`, in ``plan`` or in a plan within it, that match none of ``fqns``."""
    patterns: list[str] = plan.unmatched(fqns) if hasattr(plan, "unmatched") else []
    return patterns


def warn_of_loss(plan: Plan) -> None:
    """Warn of compressors that may lose more than half of a value, where no feedback returns it."""
    for compression in plan.compressions:
        coder = compression.by_row
        weak = coder is None or (not coder.unbiased and 0 < coder.delta < WEAK)
        if weak and not compression.feedback.feeds_back:
            warnings.warn(
                f"{compression.compressor} without feedback: what it leaves out of a step is lost for good. With SGD "
                "put error_feedback(...) around it; under AdamW try both",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip


def with_feedback(plan: Plan, change: Callable[[Compression], Compression]) -> Plan:
    """``plan`` with each of its compressions changed.

    Raises ``TypeError`` for a plan that is not a dataclass, if any of its compressions would change.
    """
    if len(plan.compressions) == 1 and plan.compressions[0] is plan:  # a compression is the uniform plan
        return change(plan.compressions[0])
    if all(change(compression) == compression for compression in plan.compressions):
        return plan
    if not is_dataclass(plan) or isinstance(plan, type):
        raise TypeError(f"{plan} hides its compressions; give by_layer, after, or one compression for all")
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    changed: Plan = replace(plan, **{name: _changed(value, change) for name, value in values.items()})
    return changed


def _changed(value: object, change: Callable[[Compression], Compression]) -> object:
    if isinstance(value, tuple):
        return tuple(_changed(item, change) for item in value)
    return with_feedback(value, change) if isinstance(value, Plan) else value


def kinds_of(plan: Plan) -> dict[str, Kind]:
    """The names that ``plan`` and any of its compressions keep."""
    kept: dict[str, Kind] = dict(getattr(plan, "kinds", {}))
    return kept | {name: kind for compression in plan.compressions for name, kind in compression.kinds.items()}


def as_plan(compress: Compress) -> Plan:
    """``compress`` as a plan; a compressor is used for every parameter.

    Raises ``TypeError`` for what is neither a plan nor a compressor.
    """
    if isinstance(compress, Plan):
        return compress
    return as_compression(compress)


def by_layer(rules: Mapping[str, Compress], *, default: Compress = None) -> ByLayer:
    """Another compression for some parameters.

    Args:
        rules: shell pattern over fully qualified names -> compression; the first match counts.
        default: for names that match none; None sends fp32.

    >>> from dtrain.compress import quantize
    >>> from dtrain.plans import by_layer
    >>> by_layer({"*norm*": None, "embedding.*": quantize(bits=8)}, default=quantize(bits=4)).of("head.weight", 0)
    Compression(compressor=Quantize(bits=4, block=512, rounding='nearest'), feedback=NoFeedback())

    Names are those of the unwrapped model, without DDP's ``module.``. Attach warns of a pattern that matches none.

    Raises ``TypeError`` for what is not a compressor or not a mapping, ``ValueError`` for an adaptive plan.
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules is {rules!r}; give {{pattern: compressor}}")
    return ByLayer(tuple((pattern, as_plan(compress)) for pattern, compress in rules.items()), as_plan(default))


def after(step: int, then: Compress, *, before: Compress = None) -> After:
    """Another compression in the first steps: warm-up in fp32, for example. All ranks count the same steps.

    Args:
        step: the first step, counted from 0, in which ``then`` is used.
        then: the compression from there on.
        before: the one until then; None sends fp32. Where both have the same feedback, its state is carried over.

    >>> from dtrain.compress import error_feedback, topk
    >>> from dtrain.plans import after
    >>> after(100, error_feedback(topk(0.01))).of("w", 99).compressor
    Cast(dtype='fp32')

    Raises ``ValueError`` for a step below 1 and for an adaptive plan, ``TypeError`` for what is not a compressor.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ValueError(f"step is {step!r}; give the number of the first step, at least 1")
    return After(step, as_plan(then), as_plan(before))
