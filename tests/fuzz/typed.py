"""Whether a record that was read has the types that it declares: what a damaged file must not slip past a parser."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path


def require_typed(value: object, declared: object = None, where: str = "") -> None:
    """Raise ``AssertionError`` unless ``value``, a dataclass by default, is what its annotations say, all the way down.

    An int is a float, a bool is no number.
    """
    if declared is None:
        declared = type(value)
    assert _fits(value, declared, where or getattr(declared, "__name__", str(declared))), (
        f"{where or declared}: {str(value)[:80]!r} is no {declared}"
    )


def _fits(value: object, declared: object, where: str) -> bool:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if declared in (object, typing.Any):
        return True
    if declared is None or declared is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one, where) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and _fit_tuple(value, arguments, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, arguments[0], where) and _fits(v, arguments[1], where) for k, v in value.items()
        )
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, origin) and all(
            _fits(v, arguments[0], where) for v in typing.cast("list[object]", value)
        )
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if declared in (str, bool, bytes, Path):
        return type(value) is declared or (declared is Path and isinstance(value, Path))
    if isinstance(declared, type) and dataclasses.is_dataclass(declared):
        hints = typing.get_type_hints(declared)
        for field in dataclasses.fields(declared):
            require_typed(getattr(value, field.name), hints[field.name], f"{where}.{field.name}")
        return isinstance(value, declared)
    return isinstance(value, declared) if isinstance(declared, type) else True


def _fit_tuple(value: tuple[object, ...], arguments: tuple[object, ...], where: str) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(_fits(one, arguments[0], where) for one in value)
    return len(value) == len(arguments) and all(
        _fits(one, declared, where) for one, declared in zip(value, arguments, strict=True)
    )
