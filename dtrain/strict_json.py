"""JSON as our files hold it, read so that whatever a damaged one holds is one kind of error.

Python's own reader also takes NaN, numbers with thousands of digits and any depth, which then fail somewhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["dumps", "integer", "number", "object_of", "parse", "read"]

LARGEST = 2**64


def read(path: Path) -> dict[str, object]:
    """The object in a file. Raises OSError where it cannot be read, ValueError, without the path, where it is none."""
    return parse(path.read_bytes())


def parse(text: str | bytes) -> dict[str, object]:
    """The object that ``text`` is. Raises ValueError, and nothing else, for anything but one whole JSON object.

    >>> parse('{"step": 3}')
    {'step': 3}
    """
    try:
        found = json.loads(text, parse_constant=_refuse, parse_int=_bounded)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def dumps(value: object, *, indent: int | None = None) -> str:
    """One JSON text with a newline at its end. Raises ValueError or TypeError for what `parse` would not take."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def integer(found: Mapping[str, object], name: str, *, least: int = 0) -> int:
    """The integer called ``name``. Raises ValueError where it is none, or below ``least``."""
    value = found.get(name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}, not an integer of at least {least}")
    return value


def number(found: Mapping[str, object], name: str) -> float | None:
    """The finite number called ``name``, or None where it is null. Raises ValueError for anything else."""
    value = found.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{name} is {value!r}, not a finite number")
    return value


def object_of(found: Mapping[str, object], name: str) -> dict[str, object]:
    """The object called ``name``. Raises ValueError where it is none."""
    value = found.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.80}, not an object")
    return value


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _bounded(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= LARGEST:
        raise ValueError(f"{digits[:20]}... is no number of 64 bits")
    return value
