"""The two-phase route: an all-reduce of encoded values, whose bytes per rank do not grow with the number of peers.

    first phase     encode one chunk for each destination, all-to-all; the owner of a chunk decodes all of it
                    and combines in rank order, in fp32
    second phase    the owner encodes what it combined, the same way or with more room, see `routes`; all-gather;
                    every rank, the owner too, decodes the same bytes

Bytes: 2 (W - 1) / W of the encoded size, what a ring all-reduce sends of the plain size. With the identity compressor
it is the deterministic dense route: bitwise independent of buckets, timing and transport.

Everything is cut per FQN, never per bucket: chunk j of a segment of n elements is its elements [j w, (j + 1) w) with
w = ceil(n / W). With the encoded chunks each rank sends its vote, one byte: whether all values were finite and, in the
first phase, a digest of their names and step (`mark`); in the first phase of a weighted mean it is the weight, in four
bytes.

With feedback, a value above `LARGEST` counts as one that is not finite, and a rank whose next state would not be finite
votes against the result in the second phase: every state that is kept allows another step.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import Aggregator, among, rank_order_mean
from dtrain.comm.compressors.cast import Cast
from dtrain.comm.compressors.compressor import Compressor, OnePass
from dtrain.comm.feedback import Compression
from dtrain.comm.layout import Named, chunk_width, from_rows, is_finite, is_keepable, to_rows
from dtrain.comm.ops import AllGather, AllToAll, Flow, Payload, Place
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import FIRST_PHASE, SECOND_PHASE, Key
from dtrain.comm.state import State

IDENTITY = Cast("fp32")
MARKS = 127
DESCRIPTION_BYTES = 256


@dataclass(frozen=True)
class Combined:
    """What a collective returns: the combined values by FQN, and whether they may be used (the same on every peer).

    ``present``: whether any peer had values of its own, if ranks said so; None where nothing was sent at all.
    """

    values: dict[str, Tensor]
    finite: bool
    present: bool | None = True


def unchanged(compression: Compression) -> Compression:
    """``compression``: the second phase is coded as the first."""
    return compression


def two_phase(
    values: Named,
    plan: Plan,
    rule: Aggregator,
    place: Place,
    key: Key,
    state: State,
    weight: float | None = None,
    present: bool | None = None,
    usable: bool = True,
    of_the_mean: Callable[[Compression], Compression] = unchanged,
) -> Flow[Combined]:
    """Combine flat ``values`` over the peers. New feedback state is staged in ``state``.

    Compressors see fp32; of fp64 values the rounding error is fed back with the compressor's.
    ``weight``: of this rank in the mean. A rank of weight 0 sends zeros and is left out, as is one whose values are
    not finite; None: all weigh the same, and none may be left out.
    ``present``: False if this rank has no values of its own and passes zeros; they count like any others.
    ``usable``: False if ``values`` were computed from something that is not finite, even if they are finite now.
    ``of_the_mean``: from a value's compression to that of its mean in the second phase; the same feedback, and the same
    answer on every rank.

    Raises ``RuntimeError`` on every peer if their names or steps differ (`mark`); not with a ``weight``.
    """
    world, device = place.size, device_of(values)
    first = first_phase(values, plan, world, key, state, weight, usable)
    values, chosen = first.values, first.chosen
    second = {fqn: of_the_mean(compression) for fqn, compression in chosen.items()}
    received = yield AllToAll(joined(first.payloads, first.vote(world, key.step, present)))
    votes = Votes(received[-1].flatten().tolist(), place)
    if weight is None:
        votes, present = yield from require_same_values(votes, values, key)
    finite = votes.passed if weight is None else votes.anybody
    chunks = dict(zip(values, cut(received, first.payloads), strict=True))
    del first  # its payloads have been sent
    payloads = []
    for fqn, value in values.items():
        compressions, second_key = (chosen[fqn], second[fqn]), replace(key, fqn=fqn, phase=SECOND_PHASE)
        payloads.append(_second_phase(value, compressions, chunks[fqn], rule, votes, second_key, state))
    finite = finite and all_staged_finite(chosen, state)
    gathered = yield AllGather(joined(payloads, vote(1, finite, None, device)))
    combined = _decoded(values, second, cut(gathered, payloads), key, world, state)
    return Combined(combined.values, combined.finite and bool(gathered[-1].all()), present is not False)


@dataclass(frozen=True)
class FirstPhase:
    """What a rank sends first. ``payloads``: of each of the ``values``, coded as ``chosen`` says, a row for each rank.

    ``finite``: whether the values may be used; with a ``weight`` always, which is 0 where they may not.
    """

    values: Named
    chosen: Mapping[str, Compression]
    payloads: list[Payload]
    weight: float | None
    finite: bool

    def vote(self, rows: int, step: int, present: bool | None, *, sound: bool = True) -> Tensor:
        """The vote on them, for ``rows`` ranks. ``sound``: whether the state that feedback has staged may be kept; if
        not, a rank with a weight sends NaN, as it cannot be left out any more.
        """
        if self.weight is not None:
            return vote(rows, True, self.weight if sound else math.nan, device_of(self.values))
        statement = mark(self.values, step) + (MARKS if present is False else 0)
        return vote(rows, self.finite and sound, None, device_of(self.values), statement)


def first_phase(
    values: Named, plan: Plan, rows: int, key: Key, state: State, weight: float | None, usable: bool
) -> FirstPhase:
    """Encode ``values`` in ``rows`` rows each; zeros of weight 0 in their place where this rank is left out."""
    chosen = {fqn: plan.of(fqn, key.step) for fqn in values}
    if weight is not None and not (usable and all_usable(values, chosen)):
        weight, values = 0.0, {fqn: torch.zeros_like(value) for fqn, value in values.items()}
    payloads: list[Payload] = []
    measures: list[Tensor] = []
    for fqn, value in values.items():
        if weight is None:
            measures.append(_measure(value, chosen[fqn]))  # here: the value is then in the caches when it is encoded
        coder, feedback = coder_of(chosen[fqn], value), chosen[fqn].feedback
        first_key = replace(key, fqn=fqn, phase=FIRST_PHASE)
        if weight == 0:
            feedback.carry_over(fqn, value, state)
            payloads.append(coder.encode(to_rows(value, rows), first_key))
        else:
            payloads.append(feedback.encode(fqn, value, coder, rows, first_key, state))
    finite = weight is not None or (usable and all_usable(values, chosen, measures))
    return FirstPhase(values, chosen, payloads, weight, finite)


def _second_phase(
    value: Tensor,
    compressions: tuple[Compression, Compression],
    chunks: Payload,
    rule: Aggregator,
    votes: Votes,
    key: Key,
    state: State,
) -> Payload:
    """The chunk of ``value`` that this rank owns, combined from all ranks' encoded ``chunks`` and encoded again.

    ``compressions``: those of the two phases.
    """
    first, second = (coder_of(compression, value) for compression in compressions)
    feedback, place = compressions[0].feedback, votes.place
    width = chunk_width(value.numel(), place.size)
    if rule is rank_order_mean and votes.alike and second == first and hasattr(first, "encode_mean"):
        chunk, payload = cast(OnePass, first).encode_mean(chunks, width, key)
    else:
        rows = first.decode(chunks, width, key.shared)
        chunk = rule(rows) if votes.alike else among(rule, rows, votes.weights)
        payload = second.encode(chunk.unsqueeze(0), key)
    if feedback.kinds:
        start = min(place.rank * width, value.numel())
        error = (chunk - second.decode(payload, width, key.shared)[0])[: value.numel() - start]
        feedback.retain_owned(key.fqn, error, start, votes.divisor, state)
    return payload


def _decoded(
    values: Named, chosen: Mapping[str, Compression], gathered: list[Payload], key: Key, world: int, state: State
) -> Combined:
    """The results, decoded from all owners' payloads of the second phase; dim 0 of ``gathered`` tensors is the rank."""
    results, sums = {}, []
    for (fqn, value), payload in zip(values.items(), gathered, strict=True):
        width, shared = chunk_width(value.numel(), world), replace(key, fqn=fqn).shared
        rows = coder_of(chosen[fqn], value).decode(tuple(tensor.flatten(0, 1) for tensor in payload), width, shared)
        results[fqn] = result = chosen[fqn].feedback.result(fqn, from_rows(rows, value.numel()), state)
        sums.append(result.sum())
    return Combined(results, all_finite(results, sums))


# ---- votes ----------------------------------------------------------------------------------------------------------


def mark(names: Iterable[str], step: int) -> int:
    """A digest of a message's names and step, 1 to `MARKS`: different ones collide once in 127 times. It costs no byte,
    as it replaces the 1 of a vote for finite values.

    >>> mark(["a", "b"], step=3) == mark(["a", "c"], step=3)
    False
    """
    return 1 + zlib.crc32("\n".join([str(step), *names]).encode()) % MARKS


def require_same_values(votes: Votes, values: Named, key: Key) -> Flow[tuple[Votes, bool]]:
    """The votes in the byte of each rank, and whether any rank was present.

    Raises ``RuntimeError`` with each peer's names and step, on all peers, if they differ.
    """
    statements = [int(statement) for statement in votes.weights]
    if len({(statement - 1) % MARKS for statement in statements if statement}) > 1:
        names = list(values)
        line = f"step {key.step}, {len(names)} values: {', '.join(names)}".encode()[:DESCRIPTION_BYTES]
        description = torch.tensor(list(line.ljust(DESCRIPTION_BYTES)), dtype=torch.uint8, device=device_of(values))
        (lines,) = yield AllGather((description,))
        descriptions = [bytes(row.tolist()).decode(errors="ignore").strip() for row in lines]
        raise RuntimeError(
            "replicas were about to combine different values with each other: "
            + "; ".join(f"replica {rank} of {line}" for rank, line in enumerate(descriptions))
            + "; every replica must exchange the same parameters in the same order"
        )
    present = any(statement <= MARKS for statement in statements)
    return Votes([min(statement, 1) for statement in statements], votes.place), present


@dataclass(frozen=True)
class Votes:
    """The weight of each rank's values in the mean: 0 for what cannot be used."""

    weights: list[float]
    place: Place

    @property
    def passed(self) -> bool:
        return all(weight > 0 for weight in self.weights)

    @property
    def anybody(self) -> bool:
        return any(weight > 0 for weight in self.weights)

    @property
    def alike(self) -> bool:
        """Whether all ranks weigh the same, or none counts: then no result is used."""
        return len(set(self.weights)) == 1

    @property
    def divisor(self) -> float:
        """What this rank's value is divided by in the mean: the number of ranks, where all weigh the same.

        A rank of weight 0 will count like any other the next time.
        """
        weight = self.weights[self.place.rank]
        return self.place.size if self.alike or weight <= 0 else sum(self.weights) / weight


def vote(rows: int, finite: bool, weight: float | None, device: torch.device, statement: int = 1) -> Tensor:
    """A rank's vote on its values, for ``rows`` ranks: [rows, 1], one byte, or four for a weight.

    ``statement``: the byte for values that are finite.
    """
    if weight is None:
        return torch.full((rows, 1), statement if finite else 0, dtype=torch.uint8, device=device)
    return torch.full((rows, 1), weight if finite else 0.0, dtype=torch.float32, device=device)


def joined(payloads: list[Payload], flags: Tensor) -> Payload:
    """All ``payloads`` as one, and ``flags`` behind them."""
    return (*(tensor for payload in payloads for tensor in payload), flags)


def cut(reply: Payload, like: list[Payload]) -> list[Payload]:
    """Undo `joined`, where ``like`` are the payloads that were sent."""
    payloads, start = [], 0
    for payload in like:
        payloads.append(reply[start : start + len(payload)])
        start += len(payload)
    return payloads


def two_phase_bytes(numels: list[int], compressor: Compressor, world: int, *, weighted: bool = False) -> int:
    """Bytes that one rank sends for one `two_phase` message over segments of ``numels`` elements.

    >>> from dtrain.compress import cast
    >>> two_phase_bytes([100], cast("fp32"), world=4)
    606
    """
    chunks = sum(compressor.row_bytes(chunk_width(numel, world)) for numel in numels) + 1
    return (world - 1) * (2 * chunks + 3 * weighted)


# ---- the compressor of a value, and what may be sent ---------------------------------------------------------------


def coder_of(compression: Compression, value: Tensor) -> Compressor | _Double:
    """The compressor of rows of ``value``, in fp32 or fp64."""
    compressor = compression.by_row
    assert compressor is not None, f"{compression.compressor} takes two rounds: see `exchange`"
    return _Double(compressor) if value.dtype == torch.float64 else compressor


@dataclass(frozen=True)
class _Double:
    """A compressor of fp64 rows around one of fp32; the identity stays one."""

    single: Compressor

    def encode(self, rows: Tensor, key: Key) -> Payload:
        return (rows,) if self.single == IDENTITY else self.single.encode(rows.float(), key)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        return payload[0] if self.single == IDENTITY else self.single.decode(payload, width, key).double()


def all_finite(values: Named, sums: list[Tensor] | None = None) -> bool:
    """Whether there is no NaN and no infinity in any of ``values``; ``sums`` over each, if they were taken already."""
    return is_finite(*values.values(), sums=sums)


def all_usable(values: Named, chosen: Mapping[str, Compression], measures: list[Tensor] | None = None) -> bool:
    """`all_finite`, and for those with feedback `is_keepable`. ``measures``: `_measure` of each, if taken already."""
    if measures is None:
        measures = [_measure(value, chosen[fqn]) for fqn, value in values.items()]
    plain: tuple[list[Tensor], list[Tensor]] = ([], [])
    fed_back: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (fqn, value), measure in zip(values.items(), measures, strict=True):
        group = fed_back if chosen[fqn].feedback.kinds else plain
        group[0].append(value)
        group[1].append(measure)
    return is_finite(*plain[0], sums=plain[1]) and is_keepable(*fed_back[0], norms=fed_back[1])


def _measure(value: Tensor, compression: Compression) -> Tensor:
    """Its norm where feedback will keep some of it, else its sum."""
    return torch.linalg.vector_norm(value) if compression.feedback.kinds else value.sum()


def all_staged_finite(chosen: Mapping[str, Compression], state: State) -> bool:
    """Whether all that feedback has staged is finite."""
    staged = (state.staging.get(fqn, {}).values() for fqn, compression in chosen.items() if compression.feedback.kinds)
    return is_finite(*(tensor for tensors in staged for tensor in tensors))


def device_of(values: Named) -> torch.device:
    """The device of ``values``; the CPU where there are none."""
    return next((value.device for value in values.values()), torch.device("cpu"))
