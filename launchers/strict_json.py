"""Strict JSON files: of the expected types or an error. Python accepts more: NaN, 1e999, any number of digits.

    read, parse       the object of a file or a text, exactly; anything else is a ValueError that says why
    integer, number   one of its values, of the type that is asked for
    dumps             a text that `parse` takes

For damaged files, and files that may hold anything, as when diagnosing a failed job:

    json_in, json_of  what a file or a text holds, its own text made printable; None where it is no JSON
    shaped            a dataclass of that, by the types of its fields, or `Damaged`: a field that is missing and has no
                      default, or is of another type, makes the whole record damaged, so all of it can be relied on
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

__all__ = [
    "Damaged", "dumps", "integer", "json_in", "json_of", "lines_in", "number", "number_in", "object_of", "parse",
    "read", "shaped", "tail",
]  # fmt: skip

WIDEST = 2**64
"""The bound of integers in a text."""
MOST_BYTES = 16 << 20
LARGEST = 2.0**53
"""The bound of a number: a time, a step, a process id. Beyond it floats are inexact and dates fail."""

# Control characters of terminals, and surrogates, which cannot be encoded.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

_T = TypeVar("_T")


def read(path: Path) -> dict[str, object]:
    """The object in a file. Raises OSError where it cannot be read, ValueError, without the path, where it is none."""
    return parse(path.read_bytes())


def parse(text: str | bytes) -> dict[str, object]:
    """The object that ``text`` is. Raises ValueError, and nothing else, for anything but one whole JSON object.

    >>> parse('{"step": 3}')
    {'step': 3}
    """
    try:
        value = _loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def dumps(value: object, *, indent: int | None = None) -> str:
    """One JSON text with a newline at its end. Raises ValueError or TypeError for what `parse` would refuse."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def integer(record: Mapping[str, object], name: str, *, least: int = 0) -> int:
    """The integer called ``name``. Raises ValueError where it is none, or below ``least``."""
    value = record.get(name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}, not an integer of at least {least}")
    return value


def number(record: Mapping[str, object], name: str) -> float | None:
    """The finite number called ``name``, or None where it is null. Raises ValueError for anything else."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{name} is {value!r}, not a finite number")
    return value


def object_of(record: Mapping[str, object], name: str) -> dict[str, object]:
    """The object called ``name``. Raises ValueError where it is none."""
    value = record.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.80}, not an object")
    return value


# ---- files that may be anything ------------------------------------------------------------------------------------


class Damaged(ValueError):
    """A record is not as it should be; the message says how."""


def json_in(path: Path) -> object:
    """The JSON value in a file; None if there is no such file, or it is too large, torn, or not JSON."""
    text = _text_in(path)
    return None if text is None else json_of(text)


def json_of(text: str) -> object:
    """The value of a JSON text, its strings made printable; None if it is not JSON."""
    try:
        return _clean(_loads(text))
    except (ValueError, RecursionError, MemoryError):
        return None


def lines_in(path: Path) -> list[object]:
    """The value of each line of a file, as `json_of`; an empty list if there is no file."""
    return [json_of(line) for line in (_text_in(path) or "").splitlines() if line.strip()]


def tail(path: Path, most: int) -> str:
    """The last ``most`` bytes of a text file at most; empty if there is no such file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most))
            return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", file.read(most).decode(errors="replace"))
    except (OSError, ValueError):
        return ""


def number_in(name: str, form: str) -> int | None:
    """The number in a file's name: ``number_in("rank-3.json", "rank-{}.json")``; None if it has another form.

    >>> number_in("rank-3.json", "rank-{}.json"), number_in("rank-x.json", "rank-{}.json")
    (3, None)
    """
    before, _, after = form.partition("{}")
    match = re.fullmatch(rf"{re.escape(before)}([0-9]{{1,9}}){re.escape(after)}", name)
    return int(match[1]) if match else None


def shaped(cls: type[_T], record: object, **given: object) -> _T:
    """The dataclass of this JSON object: ``given``, and its fields by their types. Unknown keys are left out.

    Types are text, numbers, truth values, None, a choice of text, ``object`` for anything, tuples and lists of one of
    them, and mappings from text to one.

    Raises:
        Damaged: it is no object, or a field is missing or of another type.
    """
    if not isinstance(record, Mapping):
        raise Damaged("it is no JSON object")
    hints = _hints(cast(Any, cls))
    values = dict(given)
    for entry in dataclasses.fields(cast(Any, cls)):
        if entry.name in values:
            continue
        if entry.name in record:
            values[entry.name] = _as(hints[entry.name], record[entry.name], entry.name)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise Damaged(f"it has no {entry.name}")
    return cls(**values)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _as(hint: Any, value: object, name: str) -> object:
    """``value``, which is of this type, or ``Damaged``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return _as(argument, value, name)
            except Damaged:
                continue
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= LARGEST:  # which NaN is not
            return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= LARGEST:
            return value
    elif hint is object:
        return value
    elif origin is Literal:
        if value in arguments:
            return value
    elif hint in (str, bool, type(None)):
        if type(value) is hint:
            return value
    elif origin in (tuple, list) and isinstance(value, list):
        return origin(_as(arguments[0], element, name) for element in value)
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _as(arguments[1], element, name) for key, element in value.items()}
    raise Damaged(f"its {name} is {str(value)[:40]!r}")


def _text_in(path: Path) -> str | None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            return None
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        return None if len(content) > MOST_BYTES else content.decode()
    except (OSError, ValueError):
        return None


def _clean(value: object) -> object:
    if isinstance(value, str):
        return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {cast(str, _clean(key)): _clean(element) for key, element in value.items()}
    return [_clean(element) for element in value] if isinstance(value, list) else value


def _loads(text: str | bytes) -> object:
    """Raises ValueError also for non-JSON that Python's reader accepts, and RecursionError."""
    return json.loads(text, parse_constant=_refuse, parse_int=_bounded, parse_float=_finite)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is no number of 64 bits")
    return value


def _bounded(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= WIDEST:
        raise ValueError(f"{digits[:20]}... is no number of 64 bits")
    return value
