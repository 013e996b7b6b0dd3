"""Lossless coding of messages by zstandard: another flow that sends the same, in fewer bytes, over slow CPU links.

Each rank's part of a message is coded by itself, so parts have lengths of their own. An op's parts must be of one size:
the ranks agree on the longest first, and the others are filled up. It pays where codes are far from random: sparse
gradients, embeddings, 4-bit codes, bf16; hardly for 8-bit codes of normal values. Reductions travel as they are.
Communication: for each all-to-all and all-gather a gather of 8 bytes more. Needs the package zstandard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, AllToAll, Flow, Op, Payload

R = TypeVar("R")


def packed(flow: Flow[R], level: int) -> Flow[R]:
    """``flow`` with what it sends coded at zstandard's ``level``."""
    try:
        op = next(flow)
        while True:
            op = flow.send((yield from _perform(op, level)))
    except StopIteration as done:
        result: R = done.value
        return result


def require_zstandard(level: int) -> None:
    """Raise ``ValueError`` for a level that zstandard does not know, ``ImportError`` where it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("lossless needs the package zstandard: pip install 'dtrain[lossless]'") from error
    if not isinstance(level, int) or isinstance(level, bool) or not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
        raise ValueError(f"lossless is {level!r}; give zstandard's level, 1 to {zstandard.MAX_COMPRESSION_LEVEL}")


def _perform(op: Op, level: int) -> Flow[Payload]:
    if isinstance(op, AllToAll):
        world = op.payload[0].shape[0]
        parts = [tuple(tensor[rank] for tensor in op.payload) for rank in range(world)]
        (rows,) = yield AllToAll((yield from _alike(parts, op, level)), axis=op.axis)
    elif isinstance(op, AllGather):
        (coded,) = yield from _alike([op.payload], op, level)
        (rows,) = yield AllGather((coded[0],), axis=op.axis)
        parts = [op.payload]
    else:
        return (yield op)
    found = [_decode(row, parts[0]) for row in rows]
    return tuple(torch.stack(list(column)) for column in zip(*found, strict=True))


def _alike(parts: Sequence[Payload], op: Op, level: int) -> Flow[Payload]:
    """The parts, coded, as one tensor [parts, longest] uint8; each begins with its length in 8 bytes."""
    import zstandard

    coder = zstandard.ZstdCompressor(level=level)
    blobs = [coder.compress(b"".join(_bytes(tensor) for tensor in part)) for part in parts]
    longest = torch.tensor([max(len(blob) for blob in blobs)])
    (everybody,) = yield AllGather((longest.to(op.payload[0].device),), axis=op.axis)
    buffer = torch.zeros(len(blobs), 8 + int(everybody.max()), dtype=torch.uint8)
    for row, blob in zip(buffer, blobs, strict=True):
        whole = len(blob).to_bytes(8, "little") + blob
        row[: len(whole)] = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    return (buffer.to(op.payload[0].device),)


def _decode(row: Tensor, like: Payload) -> Payload:
    import zstandard

    raw = row.cpu().numpy().tobytes()
    length = int.from_bytes(raw[:8], "little")
    plain = bytearray(zstandard.ZstdDecompressor().decompress(raw[8 : 8 + length]))
    found, start = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        part = torch.frombuffer(plain, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0).byte()
        found.append(part.clone().view(tensor.dtype).view(tensor.shape).to(tensor.device))
        start += size
    return tuple(found)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
