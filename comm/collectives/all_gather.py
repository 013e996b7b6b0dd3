"""The all-gather route: every rank's encoded values go to all, and every rank combines them in rank order, in fp32.

Communication: one all-gather. Bytes: W - 1 times the encoded size, with a byte for the vote, or four for a weight.
One phase: what is left out is each rank's own error, none is added to the mean. So it is the route of sparse payloads
among few ranks: those of W ranks hold up to W times as many elements as one. Votes are those of the two-phase route:
one message says whether all values were finite, their names and step (`mark`), and whether the state is.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from dtrain.comm.aggregators.mean import Aggregator, among, rank_order_mean
from dtrain.comm.collectives.two_phase import (
    Combined,
    Votes,
    all_finite,
    all_staged_finite,
    coder_of,
    cut,
    first_phase,
    joined,
    require_same_values,
)
from dtrain.comm.feedback import Coder
from dtrain.comm.layout import Named
from dtrain.comm.ops import AllGather, Flow, Payload, Place
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State


def all_gathered(
    values: Named,
    plan: Plan,
    rule: Aggregator,
    place: Place,
    key: Key,
    state: State,
    weight: float | None = None,
    present: bool | None = None,
    usable: bool = True,
) -> Flow[Combined]:
    """Combine flat ``values`` over the peers. New feedback state is staged in ``state``.

    ``weight``, ``present`` and ``usable``, and what is raised: as in `two_phase`.
    """
    first = first_phase(values, plan, 1, key, state, weight, usable)
    values, chosen = first.values, first.chosen
    sound = all_staged_finite(chosen, state)
    gathered = yield AllGather(joined(first.payloads, first.vote(1, key.step, present, sound=sound)))
    votes = Votes(gathered[-1].flatten().tolist(), place)
    if weight is None:
        votes, present = yield from require_same_values(votes, values, key)
        finite = votes.passed
    elif any(map(math.isnan, votes.weights)):  # not left out: no rank may use the result
        votes, finite = Votes([0.0] * place.size, place), False
    else:
        finite = votes.anybody
    results, sums = {}, []
    for (fqn, value), payload in zip(values.items(), cut(gathered, first.payloads), strict=True):
        shared = replace(key, fqn=fqn).shared
        combined = _combined(payload, coder_of(chosen[fqn], value), value.numel(), rule, votes, shared)
        results[fqn] = result = chosen[fqn].feedback.result(fqn, combined, state)
        sums.append(result.sum())
    return Combined(results, finite and all_finite(results, sums), present is not False)


def _combined(gathered: Payload, coder: Coder, width: int, rule: Aggregator, votes: Votes, shared: Key) -> Tensor:
    """The combined value [width] of all ranks' payloads, each of one row; dim 0 of ``gathered`` tensors is the rank."""
    if rule is not rank_order_mean:
        rows = coder.decode(tuple(tensor.flatten(0, 1) for tensor in gathered), width, shared)
        return rule(rows) if votes.alike else among(rule, rows, votes.weights)
    # `among` of the mean, with one decoded row in memory at a time.
    weights = [1.0] * len(votes.weights) if votes.alike else votes.weights
    counted = [rank for rank, weight in enumerate(weights) if weight > 0]
    alike = len({weights[rank] for rank in counted}) == 1
    total: Tensor | None = None
    for rank in counted:
        (row,) = coder.decode(tuple(tensor[rank] for tensor in gathered), width, shared)
        row = row if alike else weights[rank] * row
        total = row.clone() if total is None else total.add_(row)
    assert total is not None  # somebody counts, or all count alike
    return total / (len(counted) if alike else sum(weights))
