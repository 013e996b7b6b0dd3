"""Lossless coding of messages by zstandard: wraps a flow and codes its messages in fewer bytes, for slow links.

The row for each rank is coded separately, to its own length. All rows of an op must have one size, so the ranks first
agree on the longest, and the others are padded. It pays where codes are far from random: sparse gradients,
embeddings, ternary and 4-bit codes, bf16; hardly for 2-bit and 8-bit codes of normal values. An op whose longest code
is no shorter than the row itself is sent as it is, on every rank, and so are reductions.

Every rank knows the plain size of a row, so nothing longer is ever decoded, and a CRC-32 of the code is compared first:
a flipped bit would silently decode to other numbers.
Communication: for each all-to-all and all-gather another gather of 8 bytes, and 12 bytes before each code. So no op
sends more than 8 bytes beyond its own, to each peer. Needs the package zstandard.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, AllToAll, Flow, Op, Payload

R = TypeVar("R")
HEAD = 12
"""Bytes before a code: its length in 8, its CRC-32 in 4."""


def packed(flow: Flow[R], level: int | None) -> Flow[R]:
    """``flow``, with its messages coded at zstandard's ``level``; None: as they are."""
    if level is None:
        return (yield from flow)
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
        payloads = [tuple(tensor[rank] for tensor in op.payload) for rank in range(world)]
    elif isinstance(op, AllGather):
        payloads = [op.payload]
    else:
        return (yield op)
    coded = yield from _alike(payloads, op, level)
    if coded is None:
        return (yield op)
    (rows,) = yield replace(op, payload=(coded if isinstance(op, AllToAll) else coded[0],))
    decoded = []
    for rank, row in enumerate(rows):
        try:
            decoded.append(_decode(row, payloads[0]))
        except ValueError as error:
            raise ValueError(f"from rank {rank} of the {op.axis} axis: {error}") from None
    return tuple(torch.stack(list(column)) for column in zip(*decoded, strict=True))


def _alike(payloads: Sequence[Payload], op: Op, level: int) -> Flow[Tensor | None]:
    """``payloads``, coded, as one tensor [payloads, longest] uint8; each row begins with its length and its CRC-32.

    None, on every rank, where that would be no shorter. Raises ``ValueError`` where a peer announces a longer code than
    such a payload can have.
    """
    import zstandard

    coder = zstandard.ZstdCompressor(level=level)
    blobs = [coder.compress(b"".join(_bytes(tensor) for tensor in payload)) for payload in payloads]
    longest = torch.tensor([max(len(blob) for blob in blobs)])
    (lengths,) = yield AllGather((longest.to(op.payload[0].device),), axis=op.axis)
    plain = _plain_bytes(payloads[0])
    least, most, limit = int(lengths.min()), int(lengths.max()), _longest(plain)
    if not 0 <= least <= most <= limit:
        raise ValueError(
            f"a peer announces a lossless code of {least if least < 0 else most:,} bytes, where {limit:,} is the most "
            "that there can be: something was damaged on its way, or the ranks run different versions of dtrain"
        )
    if HEAD + most >= plain:
        return None
    buffer = torch.zeros(len(blobs), HEAD + most, dtype=torch.uint8)
    for row, blob in zip(buffer, blobs, strict=True):
        frame = len(blob).to_bytes(8, "little") + zlib.crc32(blob).to_bytes(4, "little") + blob
        row[: len(frame)] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    return buffer.to(op.payload[0].device)


def _decode(row: Tensor, like: Payload) -> Payload:
    """Undo `_alike` for one row. Raises ``ValueError`` for what is not the code of a payload like ``like``."""
    raw = row.cpu().numpy().tobytes()
    length, checksum = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:HEAD], "little")
    blob = raw[HEAD : HEAD + length]
    if not length or len(blob) != length or zlib.crc32(blob) != checksum:  # no bytes have the checksum 0
        raise ValueError(
            f"a lossless code of {length:,} bytes does not have the checksum it was sent with: it was damaged on its "
            "way; look at the links and the memory of these machines, and resume from a checkpoint"
        )
    plain = bytearray(_inflated(blob, _plain_bytes(like)))
    payload, start = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        data = torch.frombuffer(plain, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0).byte()
        payload.append(data.clone().view(tensor.dtype).view(tensor.shape).to(tensor.device))
        start += size
    return tuple(payload)


def _inflated(blob: bytes, size: int) -> bytes:
    import zstandard

    try:
        announced = zstandard.frame_content_size(blob)
        if announced == size:
            plain: bytes = zstandard.ZstdDecompressor().decompress(blob, allow_extra_data=False)
            if len(plain) == size:
                return plain
    except zstandard.ZstdError as error:
        raise ValueError(f"a lossless code of {len(blob):,} bytes cannot be read: {error}") from None
    raise ValueError(f"a lossless code says that it holds {announced:,} bytes, where {size:,} are due")


def _longest(plain: int) -> int:
    """Bytes of the longest code of ``plain`` bytes; zstandard's own bound is plain + plain / 256 and a little."""
    return plain + plain // 128 + 1024


def _plain_bytes(payload: Payload) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in payload)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
