"""What quantizers share: rows in blocks, each coded in a few bits beside fp32 numbers of its own, by six kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dtrain.comm.compressors.blocks import by_blocks, packed_bytes
from dtrain.comm.compressors.compressor import RowWise
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key


class Kernels(NamedTuple):
    """On blocks [m, n, block] fp32, noise alike in [0, 1), packed [m, n, bytes of a block], numbers [m, n, `numbers`].

    Each writes into what it names last: the codes and the numbers; with ``sum`` also what they do not say; the blocks;
    with ``encode_mean`` these, then the codes and the numbers.
    """

    nearest: Callable[..., None]
    stochastic: Callable[..., None]
    sum: Callable[..., None]
    decode: Callable[..., None]
    mean: Callable[..., None]
    encode_mean: Callable[..., None]


@dataclass(frozen=True)
class Coded(RowWise, ABC):
    """Payload: codes [m, bytes], and [m, blocks] fp32 or, with more than one number a block, [m, blocks, numbers]."""

    bits: int
    block: int
    rounding: str

    numbers: ClassVar[int] = 1
    """Of each block, beside its codes."""

    @property
    @abstractmethod
    def kernels(self) -> Kernels: ...

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def encode(self, rows: Tensor, key: Key) -> Payload:
        packed, numbers = self._room(rows)
        coded = [(packed, self.bits, 8), (numbers, 0, self.numbers)]
        if self.rounding == "nearest":
            by_blocks(self.kernels.nearest, [(rows, 1, 1), *coded], rows.shape[1], self.block)
        else:
            noise = torch.rand(rows.shape, generator=key.generator(rows.device), device=rows.device)
            by_blocks(self.kernels.stochastic, [(rows, 1, 1), (noise, 1, 1), *coded], rows.shape[1], self.block)
        return packed, self._by_block(numbers)

    def encode_sum(self, rows: Tensor, others: Tensor) -> tuple[Payload, Tensor] | None:
        """``encode(rows + others)`` and what it leaves out of them, in one pass; None where rounding is random."""
        if self.rounding != "nearest":
            return None
        packed, numbers = self._room(rows)
        left = torch.empty_like(rows)
        laid = [(rows, 1, 1), (others, 1, 1), (packed, self.bits, 8), (numbers, 0, self.numbers), (left, 1, 1)]
        by_blocks(self.kernels.sum, laid, rows.shape[1], self.block)
        return (packed, self._by_block(numbers)), left

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        packed, numbers = payload
        rows = numbers.new_empty(packed.shape[0], width)
        laid = [(packed, self.bits, 8), (numbers.flatten(1), 0, self.numbers), (rows, 1, 1)]
        by_blocks(self.kernels.decode, laid, width, self.block)
        return rows

    def decode_mean(self, payload: Payload, width: int) -> Tensor:
        """`rank_order_mean` of the decoded rows, [width], in one pass."""
        packed, numbers = payload
        mean = numbers.new_empty(1, width)
        laid = [(packed, self.bits, 8), (numbers.flatten(1), 0, self.numbers), (mean, 1, 1)]
        by_blocks(partial(self.kernels.mean, world=packed.shape[0]), laid, width, self.block)
        return mean[0]

    def encode_mean(self, payload: Payload, width: int, key: Key) -> tuple[Tensor, Payload]:
        """`decode_mean`, and it encoded as one row; in one pass where rounding is not random."""
        if self.rounding != "nearest":
            decoded = self.decode_mean(payload, width)
            return decoded, self.encode(decoded.unsqueeze(0), key)
        packed, numbers = payload
        mean = numbers.new_empty(1, width)
        answer, own = self._room(mean)
        laid = [(packed, self.bits, 8), (numbers.flatten(1), 0, self.numbers), (mean, 1, 1)]
        laid += [(answer, self.bits, 8), (own, 0, self.numbers)]
        by_blocks(partial(self.kernels.encode_mean, world=packed.shape[0]), laid, width, self.block)
        return mean[0], (answer, self._by_block(own))

    def row_bytes(self, width: int) -> int:
        return packed_bytes(width, self.bits, self.block) + 4 * self.numbers * -(-width // self.block)

    def _room(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For codes [m, bytes] and numbers [m, numbers * blocks]."""
        m, width = rows.shape
        packed = torch.empty(m, packed_bytes(width, self.bits, self.block), dtype=torch.uint8, device=rows.device)
        return packed, rows.new_empty(m, self.numbers * -(-width // self.block))

    def _by_block(self, numbers: Tensor) -> Tensor:
        return numbers if self.numbers == 1 else numbers.unflatten(1, (-1, self.numbers))
