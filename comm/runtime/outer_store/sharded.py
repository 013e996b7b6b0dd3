"""The outer state of a local update, sharded over the replicas: each keeps 1 / M of anchor and outer momentum.

    all-to-all:   chunk j of parameters_i to replica j          the first half of what an all-reduce sends
    replica j:    D = mean_i (anchor_j - parameters_i);   anchor_j, momentum_j = outer(anchor_j, D, momentum_j)
    all-gather:   anchor_j to all                                the second half

The same bytes and, for the elementwise outer optimizers that there are, the same bits as with all of it on every
replica; 2 fp32 numbers for each element less, but for 2 / M. Without compression: a delta can only be coded where the
anchor is, and nobody has all of it. Evaluation and checkpoints gather the anchor for as long as they need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import among
from dtrain.comm.collectives.two_phase import Combined, Votes, all_finite, vote
from dtrain.comm.layout import Named, chunk_width, from_rows, is_keepable, to_rows
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.ops import AllGather, AllToAll, Flow, Place
from dtrain.comm.outer_optimizers import Round
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.consistency import PARAMETER, Held
from dtrain.comm.runtime.loop import AttachedLocalUpdate
from dtrain.comm.runtime.parts import Flight, Part
from dtrain.comm.state import State


class AttachedSharded(AttachedLocalUpdate):
    """A `LocalUpdate` whose outer state is sharded, at work on one rank. ``owned``: this replica's chunks."""

    def __init__(self, spec: LocalUpdate, pieces: Pieces, seed: int) -> None:
        self.owned = State({"anchor": "partitioned", **dict.fromkeys(spec.outer.kinds, "partitioned")})
        super().__init__(spec, pieces, seed)

    def settle(self) -> None:
        """Gather what a checkpoint needs into ``state``; it is dropped again before the next round."""
        super().settle()
        for name in self.owned.kinds:
            for fqn, whole in self._gathered(name, self.pieces.segments).items():
                self.state.tensors.setdefault(fqn, {})[name] = whole

    def _held_alike(self) -> Held:
        """Of what each replica keeps for itself nothing; but right after a round all hold the anchor."""
        fresh = {fqn for part in self.parts if part.captured == self.steps and not self.spec.mix for fqn in part.fqns}
        if self._together:
            yield from super()._held_alike()
            return
        for name, value in self._parameters_alike():
            if name.removeprefix(PARAMETER) in fresh:
                yield name, value

    def load_integers(self, integers: Mapping[str, int]) -> None:
        super().load_integers(integers)
        for fqn, named in self.state.tensors.items():
            for name in self.owned.kinds.keys() & named.keys():
                self.owned.stage(fqn, name, self._chunk(named[name]))
        self.owned.commit()
        self._release()

    def _capture(self, part: Part) -> dict[str, Tensor]:
        self._release()
        now = self.pieces.read(part.fqns)
        finite = self._agree(is_keepable(*now.values()))
        weight = float(self.tokens - part.tokens) if finite else 0.0
        if not finite:
            self.left_out += 1
            now = {fqn: torch.zeros_like(value) for fqn, value in now.items()}
        part.sets_out(self.steps, self.tokens, self._rate)
        branch = self.owned.branch()
        flow = sharded_round(now, self.spec, self.pieces.place, branch, self._round_of(part), weight)
        part.flights.append(Flight(self.steps, branch, [self.channel.start(flow, "round")]))
        return now

    def _apply(self, part: Part, values: Named | None, mix: float) -> None:
        """``values``: the next anchors, which their owners have kept already."""
        self.rounds += values is not None
        self._merge(part, mix, values)

    def _anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        """Collective over the replicas."""
        wanted = set(fqns)
        return self._gathered("anchor", [fqn for fqn in self.pieces.segments if fqn in wanted])

    def _anchor_at(self, values: Named) -> None:
        for fqn, value in values.items():
            self.owned.stage(fqn, "anchor", self._chunk(value).clone())
        self.owned.commit()

    def _chunk(self, value: Tensor) -> Tensor:
        place = self.pieces.place
        return value[own_part(value.numel(), place)]

    def _release(self) -> None:
        for fqn in self.state.tensors:
            for name in self.owned.kinds:
                self.state.drop(fqn, name)

    def _gathered(self, name: str, fqns: Iterable[str]) -> dict[str, Tensor]:
        chunks = {fqn: self.owned.tensors.get(fqn, {}).get(name) for fqn in fqns}
        known = {fqn: chunk for fqn, chunk in chunks.items() if chunk is not None}
        numels = {fqn: self.pieces.segments[fqn].numel for fqn in known}
        return self.pieces.channel.run(gather(known, numels, self.pieces.place), "anchor")


def own_part(numel: int, place: Place) -> slice:
    """The elements of a segment of ``numel`` that this replica keeps."""
    width = chunk_width(numel, place.size)
    return slice(min(place.rank * width, numel), min((place.rank + 1) * width, numel))


def sharded_round(
    values: Named, spec: LocalUpdate, place: Place, state: State, now: Round, weight: float
) -> Flow[Combined]:
    """One round on flat fp32 parameters ``values``: returns the next anchors, whole; stages this replica's chunks."""
    finite, device = all_finite(values), next((value.device for value in values.values()), torch.device("cpu"))
    rows = tuple(to_rows(value, place.size) for value in values.values())
    *arrived, said = yield AllToAll((*rows, vote(place.size, finite, weight, device)))
    votes = Votes(said.flatten().tolist(), place)
    chunks: dict[str, Tensor] = {}
    for (fqn, value), theirs in zip(values.items(), arrived, strict=True):
        own = own_part(value.numel(), place)
        anchor = state.get(fqn, "anchor", value[own])
        deltas = anchor - theirs[:, : anchor.numel()]
        delta = spec.rule(deltas) if votes.alike else among(spec.rule, deltas, votes.weights)
        chunks[fqn] = spec.outer.step(fqn, anchor, delta, state, now)
        state.stage(fqn, "anchor", chunks[fqn])
    whole = yield from gather(chunks, {fqn: value.numel() for fqn, value in values.items()}, place)
    return Combined(whole, votes.anybody and all_finite(whole))


def gather(chunks: Named, numels: Mapping[str, int], place: Place) -> Flow[dict[str, Tensor]]:
    """Whole segments from every replica's chunks."""
    padded = []
    for fqn, chunk in chunks.items():
        row = chunk.new_zeros(chunk_width(numels[fqn], place.size))
        row[: chunk.numel()] = chunk
        padded.append(row)
    gathered = yield AllGather(tuple(padded))
    return {fqn: from_rows(rows, numels[fqn]).clone() for fqn, rows in zip(chunks, gathered, strict=True)}
