"""The outer state of a local update, sharded over the replicas: each keeps 1 / M of anchor and outer momentum.

    all-to-all:   chunk j of parameters_i to replica j          the first half of what an all-reduce sends
    replica j:    D = mean_i (anchor_j - parameters_i);   anchor_j, momentum_j = outer(anchor_j, D, momentum_j)
    all-gather:   anchor_j to all                                the second half

The same bytes and, with elementwise outer optimizers, the same bits as the replicated store; each replica keeps 2 / M
fp32 numbers for each element instead of 2. No compression: a delta can only be coded where the anchor is, and no
replica has all of it. Evaluation and checkpoints gather the anchor temporarily.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import among
from dtrain.comm.collectives.two_phase import Combined, Votes, all_finite, vote
from dtrain.comm.compressors.lossless import packed
from dtrain.comm.layout import Named, chunk_width, from_rows, to_rows
from dtrain.comm.ops import AllGather, AllToAll, Flow, Place
from dtrain.comm.outer_optimizers import Round
from dtrain.comm.runtime.consistency import PARAMETER, Held
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.guard import parameters_held, state_held
from dtrain.comm.runtime.loop_spec import LoopSpec
from dtrain.comm.runtime.outer_store.store import PseudoGradients
from dtrain.comm.runtime.rounds import Fragment, Reduction
from dtrain.comm.state import State


class ShardedStore:
    """Each replica keeps its chunks, in ``owned``."""

    whole = False

    def __init__(self, context: Context, spec: LoopSpec) -> None:
        self._context, self._spec = context, spec
        self.owned = State({"anchor": "partitioned", **dict.fromkeys(spec.outer.kinds, "partitioned")})

    def anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        """Gathered: all replicas must call it."""
        wanted = set(fqns)
        return self._gathered("anchor", [fqn for fqn in self._context.pieces.segments if fqn in wanted])

    def set_anchor(self, values: Named) -> None:
        for fqn, value in values.items():
            self.owned.stage(fqn, "anchor", self._chunk(value).clone())
        self.owned.commit()

    def pseudo_gradients(self, fqns: Collection[str]) -> PseudoGradients:
        """The parameters themselves: only the owner of a chunk knows its anchor."""
        self._release()
        return PseudoGradients(self._context.pieces.read(fqns))

    def branch(self) -> State:
        return self.owned.branch()

    def reduced(self, reduction: Reduction, fragment: Fragment, now: Round) -> list[Flow[Combined]]:
        """A `Reducer`: the outer step is part of the round."""
        weight = 1.0 if reduction.weight is None else reduction.weight
        flow = sharded_round(reduction.sent or {}, self._spec, self._context.place, reduction.branch, now, weight)
        return [packed(flow, self._spec.lossless)]

    def apply(self, fragment: Fragment, values: Named, now: Round) -> dict[str, Tensor] | None:
        return dict(values)  # the next anchors, which their owners have committed already

    def held(self, fresh: Collection[str], *, together: bool) -> Held:
        """No chunks, as each has one owner; right after a round the parameters, which are then the anchor."""
        if together:
            yield from state_held(self._context)
            return
        for name, value in parameters_held(self._context):
            if name.removeprefix(PARAMETER) in fresh:
                yield name, value

    def ahead(self, fqns: Iterable[str]) -> None:
        """Nothing to do."""

    def rest(self) -> None:
        """Nothing to do."""

    def settle(self) -> None:
        """Gather the outer state into the context's state for a checkpoint; it is dropped before the next round."""
        for name in self.owned.kinds:
            for fqn, value in self._gathered(name, self._context.pieces.segments).items():
                self._context.state.put(fqn, name, value)

    def loaded(self) -> None:
        for fqn, named in self._context.state.tensors.items():
            for name in self.owned.kinds.keys() & named.keys():
                self.owned.stage(fqn, name, self._chunk(named[name]))
        self.owned.commit()
        self._release()

    def _chunk(self, value: Tensor) -> Tensor:
        return value[owned_slice(value.numel(), self._context.place)]

    def _release(self) -> None:
        for fqn in self._context.state.tensors:
            for name in self.owned.kinds:
                self._context.state.drop(fqn, name)

    def _gathered(self, name: str, fqns: Iterable[str]) -> dict[str, Tensor]:
        pieces = self._context.pieces
        chunks = {fqn: self.owned.tensors.get(fqn, {}).get(name) for fqn in fqns}
        owned = {fqn: chunk for fqn, chunk in chunks.items() if chunk is not None}
        numels = {fqn: pieces.segments[fqn].numel for fqn in owned}
        return pieces.channel.run(gather(owned, numels, pieces.place), "anchor")


def owned_slice(numel: int, place: Place) -> slice:
    """The elements of a segment of ``numel`` that this replica keeps."""
    width = chunk_width(numel, place.size)
    return slice(min(place.rank * width, numel), min((place.rank + 1) * width, numel))


def sharded_round(
    values: Named, spec: LoopSpec, place: Place, state: State, now: Round, weight: float
) -> Flow[Combined]:
    """One round on flat fp32 parameters ``values``: returns the full next anchors, stages this replica's chunks."""
    finite, device = all_finite(values), next((value.device for value in values.values()), torch.device("cpu"))
    rows = tuple(to_rows(value, place.size) for value in values.values())
    *arrived, ballots = yield AllToAll((*rows, vote(place.size, finite, weight, device)))
    votes = Votes(ballots.flatten().tolist(), place)
    chunks: dict[str, Tensor] = {}
    for (fqn, value), rows_here in zip(values.items(), arrived, strict=True):
        owned = owned_slice(value.numel(), place)
        anchor = state.get(fqn, "anchor", value[owned])
        deltas = anchor - rows_here[:, : anchor.numel()]
        delta = spec.rule(deltas) if votes.alike else among(spec.rule, deltas, votes.weights)
        chunks[fqn] = spec.outer.step(fqn, anchor, delta, state, now)
        state.stage(fqn, "anchor", chunks[fqn])
    anchors = yield from gather(chunks, {fqn: value.numel() for fqn, value in values.items()}, place)
    return Combined(anchors, votes.anybody and all_finite(anchors))


def gather(chunks: Named, numels: Mapping[str, int], place: Place) -> Flow[dict[str, Tensor]]:
    """Full segments from the chunks of all replicas."""
    padded = []
    for fqn, chunk in chunks.items():
        row = chunk.new_zeros(chunk_width(numels[fqn], place.size))
        row[: chunk.numel()] = chunk
        padded.append(row)
    gathered = yield AllGather(tuple(padded))
    return {fqn: from_rows(rows, numels[fqn]).clone() for fqn, rows in zip(chunks, gathered, strict=True)}
