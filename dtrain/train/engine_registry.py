"""The engines by name: the choices of ``engine.name``. No engine is imported before one is built.

An engine is built by ``(model, optimizer factory, mesh, options)``; see `dtrain.train.engines.engine`. `register` adds
one: what builds it, or where that is, as "module:name".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from dtrain.train.engines.engine import Engine

Builder: TypeAlias = "Callable[..., Engine]"

_ENGINES: dict[str, str | Builder] = {
    "ddp": "dtrain.train.engines.ddp:DDPEngine",
    "fsdp": "dtrain.train.engines.fsdp:FSDPEngine",
    "zero1": "dtrain.train.engines.zero:zero1",
    "zero2": "dtrain.train.engines.zero:zero2",
    "zero3": "dtrain.train.engines.zero:zero3",
}


def register(name: str, builder: str | Builder) -> None:
    """Make ``engine.name=NAME`` mean this one, in this process."""
    _ENGINES[name] = builder


def unregister(name: str) -> None:
    """Forget an engine."""
    del _ENGINES[name]


def names() -> tuple[str, ...]:
    """All engines."""
    return tuple(_ENGINES)


def builder(name: str) -> Builder:
    """The builder of an engine. Raises ``ValueError`` for an unknown name."""
    if name not in _ENGINES:
        raise ValueError(f"engine is {name!r}; choose one of {', '.join(names())}")
    place = _ENGINES[name]
    if not isinstance(place, str):
        return place
    module, _, attribute = place.partition(":")
    build: Builder = getattr(importlib.import_module(module), attribute)
    return build
