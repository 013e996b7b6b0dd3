"""Reproducible random numbers: Philox4x32-10, a function of a number's address alone.

A number is addressed by (run key, purpose, step, worker, sample, FQN, element), where the element counts row by row in
the *unsharded* parameter. So it does not depend on the rank that draws it, the device, the dtype, the order, the number
of shards, or the version of torch: torch's own generators depend on nearly all of that, even on the size of the tensor
and the number of a GPU's multiprocessors.

    counter = (block, block >> 32, stream, stream >> 32)         a block: 128 signs, or 8 normal numbers
    stream  = BLAKE2b-64(purpose, step, worker, sample, FQN)     128-bit counter, 64-bit key

All arithmetic is on integers. Signs are exact in every dtype; normal numbers come from a table of 65,536, so that no
machine's logarithm or cosine changes them. Source: Salmon et al., SC '11, with its known-answer vectors as tests.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from dtrain.comm.layout import Segment

VERSION = "philox4x32-10/1"
"""Of all that turns an address into numbers: a replay refuses a log of another version."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_SIGNS, _NORMALS = 128, 8
"""Of one block of 128 bits."""


@dataclass(frozen=True)
class Address:
    """What a direction belongs to: one vector over all parameters for each (purpose, step, worker, sample)."""

    purpose: str
    step: int = 0
    worker: int = 0
    sample: int = 0

    def stream(self, fqn: str) -> int:
        """64 bits of the counter."""
        text = "\0".join([self.purpose, str(self.step), str(self.worker), str(self.sample), fqn])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


Wanted: TypeAlias = tuple[Address, Segment]
"""The elements of a segment, of the vector at an address."""


@dataclass(frozen=True)
class SharedRandom:
    """The numbers of one run. ``key``: 64 bits, from which all of them follow.

    >>> SharedRandom(7).signs(Address("doc"), "weight", 5)
    tensor([-1.,  1., -1., -1.,  1.])
    """

    key: int

    def __post_init__(self) -> None:
        if not isinstance(self.key, int) or not 0 <= self.key < 2**64:
            raise ValueError(f"the run's key is {self.key!r}; it is a whole number of 64 bits, in [0, 2**64)")

    def signs(self, at: Address, fqn: str, numel: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """-1 or 1 with equal probability, fp32 ``[numel]``: elements [start, start + numel) of parameter ``fqn``."""
        (drawn,) = self.signs_of([(at, Segment(fqn, start, numel))], device=device)
        return drawn

    def normal(
        self, at: Address, fqn: str, numel: int, *, start: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Of mean 0 and variance 1, at most 4.32, fp32 ``[numel]``; otherwise as `signs`."""
        (drawn,) = self.normal_of([(at, Segment(fqn, start, numel))], device=device)
        return drawn

    def signs_of(self, wanted: Sequence[Wanted], *, device: torch.device | str = "cpu") -> list[Tensor]:
        """`signs` of each of ``wanted``, drawn at once: many small ones cost what a large one does."""
        words, cuts = self._words(wanted, _SIGNS, device)
        # Bit i of a word, from the lowest, is its element i, whichever byte order the machine has.
        octets = (words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=words.device)) & 0xFF
        signs = _sign_table(str(words.device)).index_select(0, octets.flatten()).flatten()
        return [signs[start:stop] for start, stop in cuts]

    def normal_of(self, wanted: Sequence[Wanted], *, device: torch.device | str = "cpu") -> list[Tensor]:
        """`normal` of each of ``wanted``, drawn at once."""
        words, cuts = self._words(wanted, _NORMALS, device)
        halves = (words.unsqueeze(-1) >> torch.arange(0, 32, 16, device=words.device)) & 0xFFFF
        normal = _normal_table(str(words.device)).index_select(0, halves.flatten())
        return [normal[start:stop] for start, stop in cuts]

    def uniform(self, at: Address) -> float:
        """One number in [0, 1), of 53 bits."""
        stream = at.stream("")
        high, low, _, _ = philox((0, 0, stream & _MASK, stream >> 32), (self.key & _MASK, self.key >> 32))
        return float((high << 21) | (low >> 11)) / 2**53

    def _words(
        self, wanted: Sequence[Wanted], per_block: int, device: torch.device | str
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """``[blocks, 4]`` int64 below 2**32, and the bounds of each of ``wanted`` among their elements."""
        spans = [_span(segment.offset, segment.numel, per_block) for _, segment in wanted]
        sizes = torch.tensor([blocks for _, blocks in spans], device=device)
        ends = list(itertools.accumulate((blocks for _, blocks in spans), initial=0))
        streams = [at.stream(segment.fqn) for at, segment in wanted]

        def spread(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device).repeat_interleave(sizes)

        shifts = [first - end for (first, _), end in zip(spans, ends, strict=False)]
        number = torch.arange(ends[-1], device=device) + spread(shifts)
        counter = (
            number & _MASK,
            number >> 32,
            spread([stream & _MASK for stream in streams]),
            spread([stream >> 32 for stream in streams]),
        )
        starts = [segment.offset - shift * per_block for (_, segment), shift in zip(wanted, shifts, strict=True)]
        cuts = [(start, start + segment.numel) for start, (_, segment) in zip(starts, wanted, strict=True)]
        return torch.stack(philox(counter, (self.key & _MASK, self.key >> 32)), dim=1), cuts


Word = TypeVar("Word", int, Tensor)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of a counter; the four words. Numbers of 32 bits, or int64 tensors of one shape that hold them."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(x0, _MULTIPLIERS[0])
        high1, low1 = _product(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def golden(count: int = 64) -> str:
    """A digest of numbers of both kinds, for the header of a log: it differs for another generator."""
    random, at = SharedRandom(0x0123456789ABCDEF), Address("golden", 1, 2, 3)
    drawn = torch.cat([random.signs(at, "golden", count, start=100), random.normal(at, "golden", count, start=5)])
    codes = (drawn.double() * 2**40).to(torch.int64).tolist()
    return hashlib.blake2b(repr((VERSION, codes)).encode(), digest_size=8).hexdigest()


def _product(x: Word, by: int) -> tuple[Word, Word]:
    """High and low 32 bits of a product of 32-bit numbers. int64 wraps around, and keeps all 64 bits of it."""
    product = x * by
    return (product >> 32) & _MASK, product & _MASK


def _span(start: int, numel: int, per_block: int) -> tuple[int, int]:
    """The first block and the number of blocks that hold elements [start, start + numel)."""
    if start < 0 or numel < 0:
        raise ValueError(f"elements [{start}, {start + numel}) are not elements of a parameter")
    first = start // per_block
    return first, -(-(start + numel) // per_block) - first


@functools.lru_cache(maxsize=8)
def _sign_table(device: str) -> Tensor:
    """[256, 8]: the signs of a byte's bits, lowest first."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (2.0 * bits - 1.0).to(torch.float32).to(device)


@functools.lru_cache(maxsize=8)
def _normal_table(device: str) -> Tensor:
    """[65536]: the inverse distribution at the middles of as many equal intervals, scaled to variance 1.

    Rounded to multiples of 2**-20, which the last bits of another mathematical library do not reach.
    """
    inverse = NormalDist().inv_cdf
    half = torch.tensor([inverse((n + 0.5) / 65536) for n in range(32768, 65536)], dtype=torch.float64)
    half /= half.square().mean().sqrt()
    half = (half * 2**20).round() / 2**20
    return torch.cat([-half.flip(0), half]).to(torch.float32).to(device)
