"""Whole matrices of a sharded model: each is assembled on one rank of the replica, its owner, which works on it.

    to the owners    each rank sends its pieces of a matrix to the matrix's owner       all-to-all on the shard axis
    back             the owner sends each rank what it computed for those pieces        all-to-all on the shard axis

Where every rank of a replica holds whole matrices (DDP), only results are sent, by an all-gather. The owners are chosen
so that the cost is balanced. Bytes of all ranks together, for a matrix of n elements that is cut evenly over M of them:
4 n (M - 1) / M for each of the two; by the all-gather 4 n (M - 1). Rows of a message have one length, so shorter ones
are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dtrain.comm.layout import Segment
from dtrain.comm.ops import AllGather, AllToAll, Flow, Place

Work: TypeAlias = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From whole flat matrices by FQN to as many results of the same sizes."""


def balanced(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """An owner for each matrix: the dearest first, each to the rank that has the least to do.

    >>> balanced({"a": 5, "b": 4, "c": 3, "d": 2}, ranks=2)
    {'a': 0, 'b': 1, 'c': 1, 'd': 0}
    """
    loads = [0] * ranks
    owners = {}
    for fqn in sorted(costs, key=lambda fqn: (-costs[fqn], fqn)):
        owners[fqn] = rank = loads.index(min(loads))
        loads[rank] += costs[fqn]
    return {fqn: owners[fqn] for fqn in costs}


@dataclass(frozen=True)
class Replica:
    """The ranks that share the work. ``held``: of each rank, its segment of each matrix, empty ones included.

    ``whole``: every rank holds all matrices; ``held`` is then unused.
    """

    held: Sequence[Mapping[str, Segment]]
    place: Place
    whole: bool

    def work(self, pieces: Mapping[str, Tensor], work: Work, costs: Mapping[str, int]) -> Flow[Mapping[str, Tensor]]:
        """The results of ``work`` on whole matrices: this rank's piece of each, flat, in the order of ``pieces``.

        ``pieces``: this rank's part of each matrix, flat, empty where it has none. ``costs``: of work on each matrix,
        in any unit; they decide on the owners. Both name the same matrices in the same order on all ranks.
        """
        if self.place.size == 1:
            return work(pieces)
        owners = balanced(costs, self.place.size)
        by_owner = [[fqn for fqn in pieces if owners[fqn] == rank] for rank in range(self.place.size)]
        route = self._all_gathered if self.whole else self._there_and_back
        return (yield from route(pieces, work, by_owner))

    def _all_gathered(
        self, matrices: Mapping[str, Tensor], work: Work, by_owner: list[list[str]]
    ) -> Flow[Mapping[str, Tensor]]:
        results = work({fqn: matrices[fqn] for fqn in by_owner[self.place.rank]})
        width = max(sum(matrices[fqn].numel() for fqn in fqns) for fqns in by_owner)
        like = next(iter(matrices.values()))
        (rows,) = yield AllGather((_row(results, by_owner[self.place.rank], width, like),), axis="shard")
        gathered: dict[str, Tensor] = {}
        for row, fqns in zip(rows, by_owner, strict=True):
            gathered |= _cut(row, {fqn: matrices[fqn].numel() for fqn in fqns})
        return gathered

    def _there_and_back(
        self, pieces: Mapping[str, Tensor], work: Work, by_owner: list[list[str]]
    ) -> Flow[Mapping[str, Tensor]]:
        rank = self.place.rank
        width, like = self._width(by_owner), next(iter(pieces.values()))
        if not width:  # each owner holds all of its matrices
            return {**pieces, **work({fqn: pieces[fqn] for fqn in by_owner[rank]})}
        nothing: list[str] = []
        rows = [_row(pieces, fqns if owner != rank else nothing, width, like) for owner, fqns in enumerate(by_owner)]
        (received,) = yield AllToAll((torch.stack(rows),), axis="shard")
        owned = by_owner[rank]
        wholes = {fqn: like.new_empty(sum(held[fqn].numel for held in self.held)) for fqn in owned}
        for source, row in enumerate(received):
            parts = self._cut(row, owned, source) if source != rank else pieces
            for fqn in owned:
                segment = self.held[source][fqn]
                wholes[fqn][segment.offset : segment.stop] = parts[fqn]
        computed = work(wholes)
        parts_of = [
            {fqn: computed[fqn][held[fqn].offset : held[fqn].stop] for fqn in owned} for held in self.held
        ]  # by destination
        rows = [_row(part, owned if to != rank else nothing, width, like) for to, part in enumerate(parts_of)]
        (received,) = yield AllToAll((torch.stack(rows),), axis="shard")
        results = dict(parts_of[rank])
        for source, row in enumerate(received):
            if source != rank:
                results |= self._cut(row, by_owner[source], rank)
        return {fqn: results[fqn] for fqn in pieces}

    def _width(self, by_owner: list[list[str]]) -> int:
        """Elements of the longest row between two ranks, in either direction; alike on all ranks."""
        return max(
            sum(held[fqn].numel for fqn in fqns)
            for owner, fqns in enumerate(by_owner)
            for rank, held in enumerate(self.held)
            if rank != owner
        )

    def _cut(self, row: Tensor, fqns: Sequence[str], rank: int) -> dict[str, Tensor]:
        return _cut(row, {fqn: self.held[rank][fqn].numel for fqn in fqns})


def _row(pieces: Mapping[str, Tensor], fqns: Sequence[str], width: int, like: Tensor) -> Tensor:
    """``pieces`` of ``fqns`` one after the other, then zeros, [width]."""
    row = like.new_zeros(width)
    start = 0
    for fqn in fqns:
        piece = pieces[fqn]
        row[start : start + piece.numel()] = piece
        start += piece.numel()
    return row


def _cut(row: Tensor, numels: Mapping[str, int]) -> dict[str, Tensor]:
    """Undo `_row`."""
    pieces, start = {}, 0
    for fqn, numel in numels.items():
        pieces[fqn] = row[start : start + numel]
        start += numel
    return pieces
