"""A file of plain values and tensors: no pickle, whole or absent, with a digest that readers verify.

The file is a safetensors file, so that other tools can look into it: 8 bytes with the length of the header, the header
as JSON, then the tensors one after the other. The header's ``__metadata__`` holds what the tensors stand in, as JSON,
and a digest of all of it. (Format: https://github.com/huggingface/safetensors)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.comm.torch_private import is_traceable_wrapper_subclass

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
LARGEST_HEADER = 100 * 2**20
DEEPEST = 32
METADATA, VALUE, DIGEST = "__metadata__", "value", "digest"
TENSOR, PAIRS, LIST, TUPLE = "tensor", "pairs", "list", "tuple"


class DamagedFile(ValueError):
    """A file that is not what was written, or was never one of these."""


def write(path: Path, value: object) -> None:
    """Write ``value`` to ``path``, in place of what is there: temporary file, fsync, rename.

    ``value``: nested dicts, lists and tuples of tensors, numbers, text, bools and None; keys are text or integers.

    Raises ``TypeError`` for anything else, naming where it stands; ``OSError`` where the file system refuses it.
    """
    content = _content(value)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> object:
    """Undo `write`; the tensors are on the CPU.

    Raises `DamagedFile` for a file that `write` did not write, or that has changed since; ``OSError`` if it cannot be
    opened.
    """
    return decoded(path.read_bytes(), str(path))


def encoded(value: object) -> bytes:
    """What `write` would write."""
    return b"".join(_content(value))


def decoded(content: bytes, name: str) -> object:
    """Undo `encoded`. Raises `DamagedFile`, which says ``name``."""
    # A digest is no signature: behind a right one there may be any JSON, so all that reading it can raise is refused.
    try:
        return _value(memoryview(content))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise DamagedFile(f"{name} is damaged, or no file of dtrain: {error}; take another copy") from error


def _content(value: object) -> Iterator[bytes | memoryview]:
    """The file, piece by piece. Raises ``TypeError`` at once."""
    tensors: list[Tensor] = []
    described = json.dumps(_described(value, tensors, ()))
    header: dict[str, Any] = {}
    begin = 0
    for number, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.element_size()
        header[str(number)] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, begin + size],
        }  # fmt: skip
        begin += size
    digest = _digest(header, described, (_bytes(tensor) for tensor in tensors))
    text = json.dumps({**header, METADATA: {VALUE: described, DIGEST: digest}}).encode()
    text += b" " * (-len(text) % 8)
    return itertools.chain([struct.pack("<Q", len(text)) + text], map(_bytes, tensors))


def _described(value: object, tensors: list[Tensor], where: tuple[object, ...]) -> object:
    """``value`` as JSON, its tensors by number."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            raise TypeError(
                f"{_place(where)} is a {type(value).__name__}, which keeps its numbers in other tensors, as 8-bit "
                "optimizers do, and is not stored; save the optimizer's own state_dict() with torch.save, and the "
                "sync's beside it (docs/own_loop.md, By hand)"
            )
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise TypeError(f"{_place(where)} is a tensor of {value.dtype}, {value.layout}, which is not stored")
        tensors.append(value.detach())
        return {TENSOR: len(tensors) - 1}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise TypeError(f"{_place(where)} has the key {key!r}; keys are text or integers")
        return {PAIRS: [[key, _described(inner, tensors, (*where, key))] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = TUPLE if isinstance(value, tuple) else LIST
        return {kind: [_described(inner, tensors, (*where, number)) for number, inner in enumerate(value)]}
    raise TypeError(f"{_place(where)} is a {type(value).__name__}; tensors, numbers, text, lists and dicts are stored")


def _place(where: tuple[object, ...]) -> str:
    return ".".join(map(str, where)) or "the value"


def _value(content: memoryview) -> object:
    """Of the bytes of a file, verified."""
    if len(content) < 8:
        raise DamagedFile(f"it has {len(content)} bytes")
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(LARGEST_HEADER, len(content) - 8):
        raise DamagedFile(f"its header has {length} bytes, and the file {len(content)}")
    header = json.loads(str(content[8 : 8 + length], "utf-8"))
    if not isinstance(header, dict):
        raise DamagedFile("its header is no table")
    metadata = header.pop(METADATA)
    data = content[8 + length :]
    if metadata[DIGEST] != _digest(header, metadata[VALUE], [data]):
        raise DamagedFile("its digest is another one")
    tensors = [_tensor(header[str(number)], data) for number in range(len(header))]
    return _restored(json.loads(metadata[VALUE]), tensors, 0)


def _tensor(about: Mapping[str, Any], data: memoryview) -> Tensor:
    dtype = next((dtype for dtype, name in DTYPES.items() if name == about["dtype"]), None)
    begin, end = about["data_offsets"]
    shape = about["shape"]
    if dtype is None or not 0 <= begin <= end <= len(data) or math.prod(shape) * dtype.itemsize != end - begin:
        raise DamagedFile(f"a tensor of {about['dtype']} {shape} in bytes {begin} to {end}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8).view(dtype).view(shape)


def _restored(described: Any, tensors: list[Tensor], depth: int) -> object:
    if not isinstance(described, dict):
        if isinstance(described, list):
            raise DamagedFile("its values are nested in another way")
        return described
    if depth > DEEPEST or len(described) != 1:
        raise DamagedFile("its values are nested in another way")
    ((kind, inner),) = described.items()
    if kind == TENSOR:
        return tensors[inner]
    if kind == PAIRS:
        pairs = {key: _restored(value, tensors, depth + 1) for key, value in inner}
        if not all(type(key) in (str, int) for key in pairs):
            raise DamagedFile("its keys are neither text nor integers")
        return pairs
    if kind not in (LIST, TUPLE):
        raise DamagedFile(f"a value of the kind {kind[:40]!r}")
    values = [_restored(value, tensors, depth + 1) for value in inner]
    return tuple(values) if kind == TUPLE else values


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _digest(header: Mapping[str, Any], described: str, data: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(header, sort_keys=True).encode() + b"\0" + described.encode() + b"\0")
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()
