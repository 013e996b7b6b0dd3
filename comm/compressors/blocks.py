"""What block-wise compressors share: rows cut into blocks, scales that may be zero, codes packed into bytes."""

from __future__ import annotations

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
    """``codes`` [m, width] uint8 below 2^bits as [m, ceil(width * bits / 8)] bytes.

    1, 2 and 4 bits: the row is cut into 8 / bits equal parts, the first part in the lowest bits of a byte. That needs
    no gather, so it is as fast as memory. Other widths: eight codes after the other, the first code lowest.
    """
    if bits == 8:
        return codes
    if 8 % bits == 0:
        parts = 8 // bits
        planes = F.pad(codes, (0, -codes.shape[1] % parts)).view(codes.shape[0], parts, -(-codes.shape[1] // parts))
        packed = planes[:, 0].clone()
        for part in range(1, parts):
            packed |= planes[:, part] << (bits * part)
        return packed
    width = codes.shape[1]
    groups = F.pad(codes, (0, -width % 8)).view(codes.shape[0], -(-width // 8), 8)  # 8 codes fill `bits` bytes
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    words = (groups.to(torch.int64) << shifts).sum(-1)
    octets: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 0xFF
    return octets.to(torch.uint8).flatten(1)[:, : -(-width * bits // 8)]


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_bits`: ``codes`` [m, width] uint8."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        planes = [(packed >> (bits * part)) & (2**bits - 1) for part in range(8 // bits)]
        return torch.cat(planes, dim=1)[:, :width]
    groups = -(-width // 8)
    octets = F.pad(packed, (0, groups * bits - packed.shape[1])).view(packed.shape[0], groups, bits)
    shifts = torch.arange(0, 8 * bits, 8, device=packed.device)
    words = (octets.to(torch.int64) << shifts).sum(-1)
    codes: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, bits, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :width]


def pack_blocks(codes: Tensor, bits: int, block: int) -> Tensor:
    """`pack_bits` block by block, then of what is left over: the same number of bytes, with all of a block's together.

    Compiled code then goes over a block once, from its scale to its bytes.
    """
    whole = _whole(codes.shape[1], bits, block)
    if not whole:
        return pack_bits(codes, bits)
    packed = pack_bits(codes[:, :whole].reshape(-1, block), bits).reshape(codes.shape[0], whole * bits // 8)
    return packed if whole == codes.shape[1] else torch.cat([packed, pack_bits(codes[:, whole:], bits)], dim=1)


def unpack_blocks(packed: Tensor, bits: int, block: int, width: int) -> Tensor:
    """Undo `pack_blocks`: ``codes`` [m, width] uint8."""
    whole = _whole(width, bits, block)
    if not whole:
        return unpack_bits(packed, bits, width)
    bytes_ = whole * bits // 8
    codes = unpack_bits(packed[:, :bytes_].reshape(-1, block * bits // 8), bits, block).reshape(packed.shape[0], whole)
    return codes if whole == width else torch.cat([codes, unpack_bits(packed[:, bytes_:], bits, width - whole)], dim=1)


def _whole(width: int, bits: int, block: int) -> int:
    """Elements in whole blocks, if a block fills whole bytes; otherwise 0."""
    return width // block * block if bits < 8 and block * bits % 8 == 0 else 0
