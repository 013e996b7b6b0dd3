"""How a value gets from every peer to every peer: the two-phase route, and the native all-reduce.

Two-phase: encode for each destination, all-to-all, decode and combine in rank order in fp32, encode, all-gather, and
every rank, the owner of a chunk included, decodes the same bytes. Its cost does not grow with the number of ranks:
2 (W - 1) / W of the encoded size, what a ring all-reduce sends of the plain size. With the identity compressor it is
the deterministic dense route: its bits do not depend on buckets, on timing or on the transport.

Everything is cut per FQN, never per bucket: chunk j of a segment of n elements is its elements [j w, (j + 1) w) with
w = ceil(n / W). Sent by each rank and message, besides the encoded chunks: one byte that says whether all was finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import Aggregator
from dtrain.comm.compressors.base import Compressor
from dtrain.comm.feedback import Compression
from dtrain.comm.layout import Named, chunk_width, from_rows, to_rows
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Flow, Payload, Place
from dtrain.comm.seeds import Key
from dtrain.comm.state import State


@dataclass(frozen=True)
class Combined:
    """What a route returns: the combined values by FQN, and whether they may be used (the same on every peer)."""

    values: dict[str, Tensor]
    finite: bool


def two_phase(
    values: Named, compression: Compression, combine: Aggregator, place: Place, key: Key, state: State
) -> Flow[Combined]:
    """Combine flat fp32 ``values`` over the peers. New feedback state is staged in ``state``."""
    compressor, feedback, world = compression.compressor, compression.feedback, place.size
    finite = all_finite(values)
    outgoing: list[Payload] = []
    for fqn, value in values.items():
        corrected = feedback.correct(fqn, value, state)
        encoded = compressor.encode(to_rows(corrected, world), replace(key, fqn=fqn, phase="send"))
        if feedback.kinds:
            decoded = compressor.decode(encoded, chunk_width(value.numel(), world))
            feedback.retain(fqn, corrected, from_rows(decoded, value.numel()), state)
        outgoing.append(encoded)
    flags = torch.full((world, 1), finite, dtype=torch.uint8, device=_device(values))
    incoming = yield AllToAll(_joined(outgoing, flags))
    finite = bool(incoming[-1].all())

    answers: list[Payload] = []
    for (fqn, value), encoded in zip(values.items(), _cut(incoming, outgoing), strict=True):
        width = chunk_width(value.numel(), world)
        chunk = combine(compressor.decode(encoded, width))
        answer = compressor.encode(chunk.unsqueeze(0), replace(key, fqn=fqn, phase="answer"))
        if feedback.kinds:
            start = min(place.rank * width, value.numel())
            error = (chunk - compressor.decode(answer, width)[0])[: value.numel() - start]
            feedback.retain_owned(fqn, error, start, world, state)
        answers.append(answer)
    gathered = yield AllGather(_joined(answers, torch.full_like(flags[:1], finite)))
    finite = bool(gathered[-1].all())

    results = {}
    for (fqn, value), encoded in zip(values.items(), _cut(gathered, answers), strict=True):
        rows = compressor.decode(tuple(tensor.flatten(0, 1) for tensor in encoded), chunk_width(value.numel(), world))
        results[fqn] = from_rows(rows, value.numel())
    return Combined(results, finite and all_finite(results))


def native_mean(values: Named, compressor: Compressor, key: Key) -> Flow[Combined]:
    """The mean by one native all-reduce, for linear compressors. The order of summation is the transport's."""
    encoded = [compressor.encode(value.unsqueeze(0), replace(key, fqn=fqn)) for fqn, value in values.items()]
    reply = yield AllReduce(tuple(tensor for payload in encoded for tensor in payload), "mean")
    results = {}
    for (fqn, value), payload in zip(values.items(), _cut(reply, encoded), strict=True):
        results[fqn] = compressor.decode(payload, value.numel())[0]
    return Combined(results, all_finite(results))


def two_phase_bytes(numels: list[int], compressor: Compressor, world: int) -> int:
    """Bytes that one rank sends for one `two_phase` message over segments of ``numels`` elements.

    >>> from dtrain import cast
    >>> two_phase_bytes([100], cast("fp32"), world=4)
    606
    """
    chunks = sum(compressor.row_bytes(chunk_width(numel, world)) for numel in numels) + 1
    return 2 * (world - 1) * chunks


def all_finite(values: Named) -> bool:
    """Whether there is no NaN and no infinity in any of ``values``."""
    return all(bool(torch.isfinite(value).all()) for value in values.values())


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
