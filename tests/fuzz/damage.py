"""Damaged copies of files and messages: what disks, networks, editors and strangers make of them. Pure.

Bytes: bits flipped, ends cut off or added, slices removed, repeated, swapped and overwritten, fields of 4 and 8 bytes
set to extremes, digits replaced. JSON: a value replaced by one of another type or size, keys removed and added,
nesting deeper than any parser's stack.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

_NUMBERS = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"0x10", b"1_000", b"", b"9" * 5000)
_FIELDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = (
    "", "../../../outside", "/etc/passwd", "\x00", "ü" * 40, "9" * 5000, "nan", "${oc.env:HOME}", "a\nb", "\ud800",
)  # fmt: skip
_VALUES: tuple[Json, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 2**70, 1.5, 1e308, -0.0, math.nan, math.inf, [], {}, [[]],
    {"a": None}, [1, "a", None], *_TEXTS,
)  # fmt: skip
_DEEP, _HUGE = "@deep@", "@huge@"
"""Placeholders: the json module itself cannot write what they stand for."""


def damaged(data: bytes, rng: random.Random, *, others: Sequence[bytes] = ()) -> bytes:
    """``data`` with one to three damages. ``others``: files of the same kind, from which slices may come."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_WAYS)(data, rng, others)
    return data


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """JSON text with one to three changes of structure; still JSON, and not the same."""
    value: Json = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed(value, rng)
    text = json.dumps(value)
    text = text.replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000).replace(f'"{_HUGE}"', "9" * 5000)
    return text.encode()


def _changed(value: Json, rng: random.Random) -> Json:
    """``value`` with one place changed, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.2:
            return {key: kept for key, kept in value.items() if key != name}
        return {**value, name: _changed(value[name], rng)}
    if isinstance(value, dict) and rng.random() < 0.3:
        return {**value, rng.choice(("unknown", "", "__class__", "rank")): rng.choice(_VALUES)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:place], *value[place + 1 :]]
        if rng.random() < 0.1:
            return [*value, value[place]]
        return [*value[:place], _changed(value[place], rng), *value[place + 1 :]]
    if rng.random() < 0.05:
        return rng.choice((_DEEP, _HUGE))
    return rng.choice(_VALUES)


def _place(data: bytes, rng: random.Random) -> tuple[int, int]:
    """A slice of ``data``, short ones more often."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 16, 64, 512)))


def _flip(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x00"
    changed = bytearray(data)
    for _bit in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _extend(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return data + rng.choice((b"\x00", b"\xff", b"\n", b"{", rng.randbytes(4))) * rng.choice((1, 3, 64, 4096))


def _remove(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _place(data, rng)
    return data[:start] + data[stop:]


def _repeat(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _place(data, rng)
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 100)) + data[stop:]


def _swap(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    first, second = sorted((_place(data, rng), _place(data, rng)))
    if first[1] > second[0]:
        return _flip(data, rng, ())
    return b"".join(
        (data[: first[0]], data[slice(*second)], data[first[1] : second[0]], data[slice(*first)], data[second[1] :])
    )


def _overwrite(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _place(data, rng)
    return data[:start] + rng.choice((b"\x00", b"\xff", b" ")) * (stop - start) + data[stop:]


def _splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    if not others:
        return _swap(data, rng, ())
    other = rng.choice(others)
    start, stop = _place(other, rng)
    at = rng.randrange(len(data) + 1)
    return data[:at] + other[start:stop] + data[at + (stop - start) * rng.randrange(2) :]


def _field(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    form = rng.choice(("<I", ">I", "<Q", ">Q"))
    width = struct.calcsize(form)
    if len(data) < width:
        return _flip(data, rng, ())
    at = rng.choice((0, 4, 8, rng.randrange(len(data) - width + 1)))
    value = struct.pack(form, rng.choice(_FIELDS) % 2 ** (8 * width))
    return data[:at] + value + data[at + width :]


def _number(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    digits = [at for at in range(len(data)) if 48 <= data[at] < 58]
    if not digits:
        return _flip(data, rng, ())
    start = stop = rng.choice(digits)
    while stop < len(data) and 48 <= data[stop] < 58:
        stop += 1
    return data[:start] + rng.choice(_NUMBERS) + data[stop:]


_WAYS: tuple[Callable[[bytes, random.Random, Sequence[bytes]], bytes], ...] = (
    _flip, _flip, _flip, _cut, _extend, _remove, _repeat, _swap, _overwrite, _splice, _field, _number,
)  # fmt: skip
