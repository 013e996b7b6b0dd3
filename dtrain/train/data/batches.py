"""Which samples a rank reads in a step, and how they become a batch: pure functions of the step and the rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dtrain.train.data.order import example_at


class Examples(Protocol):
    """The part of a map-style data set that batches are made from."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        """Example ``index``: tensors by name, of the same shapes in every example."""
        ...


def positions(step: int, *, batch_size: int, rank: int, world: int) -> range:
    """Global sample positions that ``rank`` of ``world`` reads in ``step`` (from 0).

    The ranks' shares are contiguous and equal; together they are ``step * batch_size`` up to
    ``(step + 1) * batch_size`` for every ``world``, so that a run may resume with another number of ranks. Raises
    ``ValueError`` where ``world`` does not divide ``batch_size``.

    >>> positions(3, batch_size=8, rank=1, world=2)
    range(28, 32)
    """
    _check_rank(rank, world)
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    if batch_size < 1 or batch_size % world:
        below, above = batch_size // world * world, (max(batch_size, 0) // world + 1) * world
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(f"a batch of {batch_size} examples does not divide among {world} ranks; take {nearest}")
    share = batch_size // world
    first = step * batch_size + rank * share
    return range(first, first + share)


def fetch(dataset: Examples, indices: Iterable[int]) -> dict[str, Tensor]:
    """The examples ``indices`` of ``dataset`` as one batch: every tensor gains a leading dim of ``len(indices)``."""
    batch: dict[str, Tensor] = default_collate([dataset[index] for index in indices])
    return batch


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's share of each global batch, which has ``batch_size`` examples of all ranks."""

    data: Examples
    seed: int
    batch_size: int
    microbatch_size: int
    rank: int
    world: int
    device: torch.device

    def indices(self, step: int) -> list[int]:
        """The examples of ``step``, counted from 0, in the run's order."""
        share = positions(step, batch_size=self.batch_size, rank=self.rank, world=self.world)
        return [example_at(self.seed, position, len(self.data)) for position in share]

    def microbatches(self, step: int) -> list[dict[str, Tensor]]:
        """All batches of ``step``."""
        indices, size = self.indices(step), self.microbatch_size
        return [self._on_device(indices[start : start + size]) for start in range(0, len(indices), size)]

    def first_microbatch(self, step: int) -> dict[str, Tensor]:
        return self._on_device(self.indices(step)[: self.microbatch_size])

    def _on_device(self, indices: list[int]) -> dict[str, Tensor]:
        batch = fetch(self.data, indices)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}


def evaluation_indices(length: int, wanted: int, *, rank: int, world: int) -> list[int]:
    """The examples that ``rank`` evaluates: of ``min(wanted, length)`` spread evenly over the data set, its share.

    The union over the ranks is the same for every ``world``. Shares differ by at most one example and may be empty:
    weight the ranks' means by their counts.

    >>> [evaluation_indices(100, 5, rank=rank, world=2) for rank in range(2)]
    [[0, 20, 40], [60, 80]]
    """
    _check_rank(rank, world)
    if length < 0 or wanted < 0:
        raise ValueError(f"length is {length} and wanted is {wanted}; neither can be negative")
    count = min(wanted, length)
    share, longer = divmod(count, world)
    first = rank * share + min(rank, longer)
    return [number * length // count for number in range(first, first + share + (rank < longer))]


def _check_rank(rank: int, world: int) -> None:
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank is {rank} of {world}; ranks count from 0 to the number of ranks - 1")
