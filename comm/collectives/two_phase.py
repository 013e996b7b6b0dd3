"""How a value gets from every peer to every peer: the two-phase route, and the native all-reduce.

Two-phase: encode for each destination, all-to-all, decode and combine in rank order in fp32, encode, all-gather, and
every rank, the owner of a chunk included, decodes the same bytes. Its cost does not grow with the number of ranks:
2 (W - 1) / W of the encoded size, what a ring all-reduce sends of the plain size. With the identity compressor it is
the deterministic dense route: its bits do not depend on buckets, on timing or on the transport.

Everything is cut per FQN, never per bucket: chunk j of a segment of n elements is its elements [j w, (j + 1) w) with
w = ceil(n / W). Sent by each rank and message, besides the encoded chunks: one byte that says whether all was finite
and, in the first phase, of which names and step it speaks (`mark`); in the first phase of a weighted mean four bytes,
the weight.

Where feedback keeps something, a value above `LARGEST` counts as one that is not finite, and a rank whose next state
would not be finite says so with its answer: no rank ever keeps what no step could be made from.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import Aggregator, among, rank_order_mean
from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import Compressor, one_pass
from dtrain.comm.compressors.lowrank import LowRank
from dtrain.comm.feedback import Compression, Feedback
from dtrain.comm.layout import Named, chunk_width, from_rows, is_finite, is_keepable, to_rows
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Flow, Payload, Place
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State

IDENTITY = cast("fp32")
MARKS = 127
DESCRIPTION_BYTES = 256


@dataclass(frozen=True)
class Combined:
    """What a route returns: the combined values by FQN, and whether they may be used (the same on every peer).

    ``present``: whether any peer had values of its own, where that was asked; None where nothing was sent at all.
    """

    values: dict[str, Tensor]
    finite: bool
    present: bool | None = True


def two_phase(
    values: Named,
    plan: Plan,
    combine: Aggregator,
    place: Place,
    key: Key,
    state: State,
    weight: float | None = None,
    present: bool | None = None,
    usable: bool = True,
) -> Flow[Combined]:
    """Combine flat ``values`` over the peers. New feedback state is staged in ``state``.

    Compressors see fp32. What that rounds of values in fp64 is the compressor's loss, and fed back with it.
    ``weight``: what this rank counts in the mean. A rank of weight 0 gives zeros and is left out, as is one whose
    values are not finite; None: all count alike, and none may be left out. ``present``: False for zeros in place of
    values that this rank does not have; they count like any others. ``usable``: False for values that come from what
    is not finite.

    Raises ``RuntimeError`` on every peer where they came with different values (`mark`), without a ``weight``.
    """
    world = place.size
    chosen = {fqn: plan.of(fqn, key.step) for fqn in values}
    if weight is not None and not (usable and all_usable(values, chosen)):
        weight, values = 0.0, {fqn: torch.zeros_like(value) for fqn, value in values.items()}
    outgoing: list[Payload] = []
    measures = []
    for fqn, value in values.items():
        if weight is None:
            measures.append(_measure(value, chosen[fqn]))  # here, so that what is encoded next is in the caches
        compressor, feedback = _in_rows(chosen[fqn], value)
        own = replace(key, fqn=fqn, phase="send")
        if weight == 0:
            feedback.sit_out(fqn, value, state)
            outgoing.append(compressor.encode(to_rows(value, world), own))
        else:
            outgoing.append(feedback.encode(fqn, value, compressor, world, own, state))
    finite = weight is not None or (usable and all_usable(values, chosen, measures))
    said = mark(values, key.step) + (MARKS if present is False else 0)
    incoming = yield AllToAll(_joined(outgoing, vote(world, finite, weight, _device(values), said)))
    votes = Votes(incoming[-1].flatten().tolist(), place)
    if weight is None:
        votes, present = yield from _heard(votes, values, key)
    finite = votes.passed if weight is None else votes.anybody

    answers: list[Payload] = []
    for (fqn, value), encoded in zip(values.items(), _cut(incoming, outgoing), strict=True):
        compressor, feedback = _in_rows(chosen[fqn], value)
        width = chunk_width(value.numel(), world)
        own = replace(key, fqn=fqn, phase="answer")
        quick = one_pass(compressor) if combine is rank_order_mean and votes.alike else None
        if quick is not None:
            chunk, answer = quick.encode_mean(encoded, width, own)
        else:
            rows = compressor.decode(encoded, width, own.shared)
            chunk = combine(rows) if votes.alike else among(combine, rows, votes.weights)
            answer = compressor.encode(chunk.unsqueeze(0), own)
        if feedback.kinds:
            start = min(place.rank * width, value.numel())
            error = (chunk - compressor.decode(answer, width, own.shared)[0])[: value.numel() - start]
            feedback.retain_owned(fqn, error, start, votes.world, state)
        answers.append(answer)
    finite = finite and _sound(chosen, state)
    gathered = yield AllGather(_joined(answers, vote(1, finite, None, _device(values))))
    found = _results(values, chosen, _cut(gathered, answers), key, world, state)
    return Combined(found.values, found.finite and bool(gathered[-1].all()), present is not False)


def _results(
    values: Named, chosen: Mapping[str, Compression], gathered: list[Payload], key: Key, world: int, state: State
) -> Combined:
    """What all chunks' owners have answered, decoded: each tensor of ``gathered`` begins with the ranks."""
    results, sums = {}, []
    for (fqn, value), encoded in zip(values.items(), gathered, strict=True):
        compressor, feedback = _in_rows(chosen[fqn], value)
        width, shared = chunk_width(value.numel(), world), replace(key, fqn=fqn).shared
        rows = compressor.decode(tuple(tensor.flatten(0, 1) for tensor in encoded), width, shared)
        results[fqn] = result = feedback.result(fqn, from_rows(rows, value.numel()), state)
        sums.append(result.sum())
    return Combined(results, all_finite(results, sums))


def mark(names: Iterable[str], step: int) -> int:
    """A digest of what a message is about, 1 to `MARKS`: two that are not of the same names and step differ but for
    one time in 127. It costs no byte, as it takes the place of the 1 that says that all is finite.

    >>> mark(["a", "b"], step=3) == mark(["a", "c"], step=3)
    False
    """
    return 1 + zlib.crc32("\n".join([str(step), *names]).encode()) % MARKS


def _heard(votes: Votes, values: Named, key: Key) -> Flow[tuple[Votes, bool]]:
    """What all have said in one byte each: their votes, and whether anybody was present.

    Raises ``RuntimeError`` that says what each peer came with, if they do not speak of the same: all of them see it.
    """
    heard = [int(one) for one in votes.weights]
    if len({(one - 1) % MARKS for one in heard if one}) > 1:
        names = list(values)
        line = f"step {key.step}, {len(names)} values: {', '.join(names)}".encode()[:DESCRIPTION_BYTES]
        mine = torch.tensor(list(line.ljust(DESCRIPTION_BYTES)), dtype=torch.uint8, device=_device(values))
        (lines,) = yield AllGather((mine,))
        told = [bytes(row.tolist()).decode(errors="ignore").strip() for row in lines]
        raise RuntimeError(
            "replicas were about to combine different values with each other: "
            + "; ".join(f"replica {rank} of {line}" for rank, line in enumerate(told))
            + "; every replica must exchange the same parameters in the same order"
        )
    return Votes([min(one, 1) for one in heard], votes.place), any(one <= MARKS for one in heard)


@dataclass(frozen=True)
class Votes:
    """What the ranks said of their values: 0 for what cannot be used, else how much they count."""

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
        """Whether all ranks count the same; where nobody counts, nothing of what follows is used."""
        return len(set(self.weights)) == 1

    @property
    def world(self) -> float:
        """See `Feedback.retain_owned`. A rank that does not count now counts like any other the next time."""
        own = self.weights[self.place.rank]
        return self.place.size if self.alike or own <= 0 else sum(self.weights) / own


def vote(rows: int, finite: bool, weight: float | None, device: torch.device, said: int = 1) -> Tensor:
    """What a rank says of its values, to ``rows`` ranks: [rows, 1], one byte, or four for a weight.

    ``said``: the byte for values that are finite.
    """
    if weight is None:
        return torch.full((rows, 1), said if finite else 0, dtype=torch.uint8, device=device)
    return torch.full((rows, 1), weight if finite else 0.0, dtype=torch.float32, device=device)


def native_mean(
    values: Named,
    plan: Plan,
    key: Key,
    state: State,
    weight: float | None = None,
    present: bool | None = None,
    usable: bool = True,
) -> Flow[Combined]:
    """The mean by one native all-reduce, for linear compressors of one dtype. The transport orders the summation.

    ``weight``, ``present`` and ``usable``: as in `two_phase`; weights for payloads in fp32. Unless ``present`` is None,
    one more element says it.
    """
    chosen = {fqn: plan.of(fqn, key.step) for fqn in values}
    if weight is not None or not usable or any(each.feedback.kinds for each in chosen.values()):
        usable = usable and all_usable(values, chosen)
    counts = weight if weight is None or usable else 0.0
    encoded: list[Payload] = []
    for fqn, value in values.items():
        compressor, feedback = _in_rows(chosen[fqn], value)
        if counts == 0:
            feedback.sit_out(fqn, value, state)
            value = torch.zeros_like(value)
            encoded.append(compressor.encode(value.view(1, -1), replace(key, fqn=fqn)))
        else:
            encoded.append(feedback.encode(fqn, value, compressor, 1, replace(key, fqn=fqn), state))
    sent = tuple(tensor for payload in encoded for tensor in payload)
    if not (usable and _sound(chosen, state)):  # there is no vote beside the sum, so it says it
        sent = tuple(torch.full_like(tensor, torch.nan) for tensor in sent) if counts != 0 else sent
    if counts is None and present is None:
        reply = yield AllReduce(sent, "mean")
        finite = True
    elif counts is None:
        like = sent[0] if sent else torch.empty(0, device=_device(values))
        *means, had = yield AllReduce((*sent, like.new_full((1,), float(bool(present)))), "mean")
        reply, finite, present = tuple(means), True, float(had) > 0
    else:
        own = torch.tensor([counts], device=_device(values))
        *sums, total = yield AllReduce((*(counts * tensor for tensor in sent), own), "sum")
        finite = float(total) > 0
        reply = tuple(each.div_(total) for each in sums)
    results = {}
    for (fqn, value), payload in zip(values.items(), _cut(reply, encoded), strict=True):
        compressor, feedback = _in_rows(chosen[fqn], value)
        decoded = compressor.decode(payload, value.numel(), replace(key, fqn=fqn).shared)[0]
        results[fqn] = feedback.result(fqn, decoded, state)
    return Combined(results, finite and all_finite(results), present is not False)


def two_phase_bytes(numels: list[int], compressor: Compressor, world: int, *, weighted: bool = False) -> int:
    """Bytes that one rank sends for one `two_phase` message over segments of ``numels`` elements.

    >>> from dtrain.compress import cast
    >>> two_phase_bytes([100], cast("fp32"), world=4)
    606
    """
    chunks = sum(compressor.row_bytes(chunk_width(numel, world)) for numel in numels) + 1
    return (world - 1) * (2 * chunks + 3 * weighted)


def _in_rows(compression: Compression, value: Tensor) -> tuple[Compressor | _Double, Feedback]:
    compressor = compression.compressor
    assert not isinstance(compressor, LowRank)  # it does not come this way: `combine`
    if value.dtype == torch.float64:
        return _Double(compressor), compression.feedback
    return compressor, compression.feedback


@dataclass(frozen=True)
class _Double:
    """A compressor of fp64 rows, made of one of fp32; the identity stays one."""

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
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (fqn, value), measure in zip(values.items(), measures, strict=True):
        group = kept if chosen[fqn].feedback.kinds else plain
        group[0].append(value)
        group[1].append(measure)
    return is_finite(*plain[0], sums=plain[1]) and is_keepable(*kept[0], norms=kept[1])


def _measure(value: Tensor, compression: Compression) -> Tensor:
    """Its norm where feedback will keep some of it, else its sum."""
    return torch.linalg.vector_norm(value) if compression.feedback.kinds else value.sum()


def _sound(chosen: Mapping[str, Compression], state: State) -> bool:
    """Whether all that feedback has staged is finite."""
    staged = (state.staging.get(fqn, {}).values() for fqn, each in chosen.items() if each.feedback.kinds)
    return is_finite(*(tensor for tensors in staged for tensor in tensors))


def _device(values: Named) -> torch.device:
    return next((value.device for value in values.values()), torch.device("cpu"))


def _joined(encoded: list[Payload], flags: Tensor) -> Payload:
    return (*(tensor for payload in encoded for tensor in payload), flags)


def _cut(reply: Payload, like: list[Payload]) -> list[Payload]:
    out, start = [], 0
    for payload in like:
        out.append(reply[start : start + len(payload)])
        start += len(payload)
    return out
