"""Which k of n elements are kept, in a number of bits that depends on n and k alone: Elias-Fano, or a bit for each.

    Elias-Fano   the low bits of each position as they are; of the high bits h of the i-th position, bit h + i is set
                 k low + k + (n - 1) / 2^low bits, some 0.6 bits for each position more than the least possible
    a bit each   n bits, where that is less

Golomb codes of the gaps are a few percent smaller on average, but their length depends on the positions, and messages
here have fixed shapes. Source: P. Elias, Efficient storage and retrieval by content and address of static files,
Journal of the ACM 21, 1974.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dtrain.comm.shadowed import on_shadows


@functools.cache
def low_bits(n: int, k: int) -> int | None:
    """The number of low bits of a position that make the Elias-Fano code shortest; None if a bit each is shorter."""
    low = min(range(max(n - 1, 1).bit_length()), key=lambda low: _elias_fano(n, k, low))
    return low if _elias_fano(n, k, low) < n else None


def position_bits(n: int, k: int) -> int:
    """The length of the code.

    >>> position_bits(2048, 205), position_bits(2048, 1024)
    (1075, 2048)
    """
    if not k:
        return 0
    low = low_bits(n, k)
    return n if low is None else _elias_fano(n, k, low)


def positions_to_bits(positions: Tensor, n: int) -> Tensor:
    """Code ``positions`` [..., k], ascending and below ``n``: bits [..., `position_bits`] uint8."""
    k = positions.shape[-1]
    if not k:
        return positions.to(torch.uint8)
    low = low_bits(n, k)
    if low is None:
        return positions.new_zeros((*positions.shape[:-1], n), dtype=torch.uint8).scatter_(-1, positions, 1)
    high = positions.new_zeros((*positions.shape[:-1], k + ((n - 1) >> low)), dtype=torch.uint8)
    high.scatter_(-1, (positions >> low) + torch.arange(k, device=positions.device), 1)
    lows = (positions.unsqueeze(-1) >> torch.arange(low, device=positions.device)) & 1
    return torch.cat([high, lows.flatten(-2).to(torch.uint8)], dim=-1)


def _positions(bits: Tensor, n: int, k: int) -> Tensor:
    """`positions_of_bits` without values."""
    return bits.new_empty((*bits.shape[:-1], k), dtype=torch.int64)


@on_shadows(_positions)
def positions_of_bits(bits: Tensor, n: int, k: int) -> Tensor:
    """Undo `positions_to_bits`: positions [..., k] int64.

    Raises ``ValueError`` for bits that are no code of ``k`` positions below ``n``.
    """
    if not k:
        return bits.new_zeros((*bits.shape[:-1], 0), dtype=torch.int64)
    low = low_bits(n, k)
    high = bits if low is None else bits[..., : k + ((n - 1) >> low)]
    if bool((high.sum(-1, dtype=torch.int64) == k).all()):
        places = high.flatten(0, -2).nonzero()[:, 1].view(*bits.shape[:-1], k)
        if low is None:
            return places
        lows = bits[..., high.shape[-1] :].unflatten(-1, (k, low)).to(torch.int64)
        highs = places - torch.arange(k, device=bits.device)
        positions: Tensor = (highs << low) + (lows << torch.arange(low, device=bits.device)).sum(-1)
        if bool((positions.diff(dim=-1) > 0).all()) and bool((positions[..., -1:] < n).all()):
            return positions
    raise ValueError(
        f"a payload does not hold {k} ascending positions of {n}: it was damaged on its way, or the ranks were given "
        "different models or densities"
    )


def _elias_fano(n: int, k: int, low: int) -> int:
    return k * low + k + ((n - 1) >> low)
