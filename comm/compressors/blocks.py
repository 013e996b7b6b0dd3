"""What block-wise compressors share: rows cut into blocks, scales that may be zero, codes packed into bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


def checked_block(block: int) -> int:
    """``block``, or ``ValueError`` where it is no positive number of elements."""
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block is {block!r}; give a positive number of elements, for example 512")
    return block


def to_blocks(rows: Tensor, block: int) -> Tensor:
    """``rows`` [m, width] as [m, blocks, block]; the last block is filled up with zeros. A view where it fits."""
    missing = -rows.shape[1] % block
    padded = F.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(rows.shape[0], padded.shape[1] // block, block)


def scaled(blocks: Tensor, scale: Tensor) -> Tensor:
    """``blocks / scale``; a block of scale zero stays zero instead of becoming NaN, and NaN stays NaN."""
    return blocks / torch.where(scale == 0, 1.0, scale)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """``codes`` [..., width] uint8 below 2^bits as [..., ceil(width * bits / 8)] bytes.

    1, 2 and 4 bits: the row is cut into 8 / bits equal parts, the first part in the lowest bits of a byte. That needs
    no gather, so it is as fast as memory. Other widths: eight codes after the other, the first code lowest.
    """
    if bits == 8:
        return codes
    width = codes.shape[-1]
    if 8 % bits == 0:
        parts = 8 // bits
        part = -(-width // parts)
        padded = F.pad(codes, (0, parts * part - width)) if width % parts else codes
        packed = padded[..., :part]
        for number in range(1, parts):
            packed = packed | (padded[..., number * part : (number + 1) * part] << (bits * number))
        return packed
    groups = F.pad(codes, (0, -width % 8)).unflatten(-1, (-(-width // 8), 8))  # 8 codes fill `bits` bytes
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    words = (groups.to(torch.int64) << shifts).sum(-1)
    octets: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 0xFF
    return octets.to(torch.uint8).flatten(-2)[..., : -(-width * bits // 8)]


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_bits`: ``codes`` [..., width] uint8."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        planes = [(packed >> (bits * part)) & (2**bits - 1) for part in range(8 // bits)]
        return torch.cat(planes, dim=-1)[..., :width]
    groups = -(-width // 8)
    octets = F.pad(packed, (0, groups * bits - packed.shape[-1])).unflatten(-1, (groups, bits))
    shifts = torch.arange(0, 8 * bits, 8, device=packed.device)
    words = (octets.to(torch.int64) << shifts).sum(-1)
    codes: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, bits, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :width]


def pack_blocks(codes: Tensor, bits: int, block: int) -> Tensor:
    """`pack_bits` block by block, then of what is left over, so that all of a block's bytes lie together.

    Compiled code then goes over a block once, from its scale to its bytes.
    """
    packed = codes.new_empty(codes.shape[0], packed_bytes(codes.shape[1], bits, block))

    def run(codes: Tensor, packed: Tensor) -> None:
        packed.copy_(pack_bits(codes, bits))

    by_blocks(run, [(codes, 1, 1), (packed, bits, 8)], codes.shape[1], block)
    return packed


def unpack_blocks(packed: Tensor, bits: int, block: int, width: int) -> Tensor:
    """Undo `pack_blocks`: ``codes`` [m, width] uint8."""
    codes = packed.new_empty(packed.shape[0], width)

    def run(packed: Tensor, codes: Tensor) -> None:
        codes.copy_(unpack_bits(packed, bits, codes.shape[-1]))

    by_blocks(run, [(packed, bits, 8), (codes, 1, 1)], width, block)
    return codes


def packed_bytes(width: int, bits: int, block: int) -> int:
    """Bytes of a row of ``width`` codes that `pack_blocks` packed; each block begins at a byte.

    >>> packed_bytes(1000, bits=4, block=512), packed_bytes(10, bits=3, block=4)
    (500, 5)
    """
    return width // block * bytes_of(block, bits, 8) + bytes_of(width % block, bits, 8)


def bytes_of(elements: int, numerator: int, denominator: int) -> int:
    """``elements * numerator / denominator``, rounded up."""
    return -(-elements * numerator // denominator)


Laid: TypeAlias = tuple[Tensor, int, int]
"""A tensor of rows, and how many of its elements one element of a block has there: a fraction, or (0, n): n a block."""


def by_blocks(run: Callable[..., None], tensors: Sequence[Laid], width: int, block: int) -> None:
    """Let ``run`` go over rows of ``width`` elements block by block: first over all whole blocks, then over the rest.

    It gets views [m, blocks, elements of one], in the order of ``tensors``, and writes into some of them.
    """
    offsets = [0] * len(tensors)
    for count, size in ((width // block, block), (1, width % block)):
        if not count or not size:
            continue
        views = []
        for number, (tensor, numerator, denominator) in enumerate(tensors):
            each = bytes_of(size, numerator, denominator) if numerator else denominator
            part = tensor.narrow(1, offsets[number], count * each)
            offsets[number] += count * each
            views.append(part.view(-1, count, each))
        run(*views)
