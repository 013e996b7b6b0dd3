"""What functions that read values do where there are none: on shadows, tensors that have a shape and no memory.

The clock (`dtrain.comm.clock`) runs methods on shadows. Their arithmetic needs no rule, as shapes follow from shapes;
a function that looks at values, or that goes over thousands of ranks one by one, says with `on_shadows` what it
returns instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, Protocol, TypeVar, cast

from torch import Tensor

from dtrain.comm.torch_private import without_overrides

P = ParamSpec("P")
R = TypeVar("R")


class ShadowTensor(Protocol):
    """A tensor without values."""

    def meet(self, tensors: Sequence[Tensor]) -> None:
        """One pass over ``tensors``, some of which it reads and some of which it writes."""


def is_shadow(value: object) -> bool:
    """Whether ``value`` is a tensor without values."""
    return getattr(type(value), "is_shadow", False)


def shadow_among(tensors: Sequence[Tensor]) -> ShadowTensor | None:
    """The first shadow in ``tensors``; None where all have values."""
    return next((cast(ShadowTensor, tensor) for tensor in tensors if is_shadow(tensor)), None)


def of_values(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of numbers: what it allocates has values, however large, also where a clock runs."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_overrides():
            return function(*args, **kwargs)

    return call


def on_shadows(rule: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to return ``rule`` of its arguments where one is a shadow, or a mapping's value is."""

    def shadowed(value: object) -> bool:
        return is_shadow(value) or (isinstance(value, Mapping) and any(map(is_shadow, value.values())))

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            without_values = any(map(shadowed, args)) or (bool(kwargs) and any(map(shadowed, kwargs.values())))
            return rule(*args, **kwargs) if without_values else function(*args, **kwargs)

        return call

    return decorated
