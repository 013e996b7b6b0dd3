"""Exchanges around the method's own: checks that all ranks were given the same, and small sums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.layout import in_messages
from dtrain.comm.ops import AllGather, AllReduce, Axis, Broadcast, Flow
from dtrain.comm.pieces import Pieces


def agreement_digest(description: str, spec: str, pieces: Pieces) -> bytes:
    """A digest of what must be the same on all peers: the method, its settings and seed, the pieces of the model."""
    segments = sorted((fqn, *vars(segment).values()) for fqn, segment in pieces.segments.items())
    text = f"{description}\n{without_addresses(spec)}\n{segments}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def require_agreement(description: str, spec: str, pieces: Pieces) -> None:
    """Raise ``ValueError`` unless all peers were given the same method and model. Every rank must call it."""
    digest = torch.tensor(list(agreement_digest(description, spec, pieces)), dtype=torch.uint8)
    digests = pieces.channel.run(gathered(digest), "agreement")
    differing = [rank for rank, theirs in enumerate(digests) if not torch.equal(theirs, digest)]
    if differing:
        raise ValueError(
            f"replicas {differing} were given another sync, seed or model than this one, which has {description} and "
            f"{len(pieces.segments)} parameters; give all ranks the same"
        )


def begin_alike(pieces: Pieces) -> None:
    """Give every replica the parameters of replica 0. Every rank must call it."""
    for names in in_messages(pieces.shapes):  # in groups: there may be no memory for a second model
        values = pieces.read(names, copy=False)
        pieces.write(pieces.channel.run(_broadcast(values), "set-up"), names)


def sum_over_shards(channel: Channel, values: Tensor, label: str) -> Tensor:
    """The sum of ``values`` over the ranks of one replica, on the CPU. Every rank must call it."""
    # Alone without the channel: the way to its thread and back takes milliseconds under load.
    alone = channel.places["shard"].size == 1
    return values.cpu() if alone else channel.run(_sum_over_shards(values.cpu()), label)


def without_addresses(text: str) -> str:
    """``text`` without memory addresses, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def gathered(value: Tensor, axis: Axis = "replicate") -> Flow[Tensor]:
    """``value`` of every rank along ``axis``, [world, ...]."""
    (values,) = yield AllGather((value,), axis)
    return values


def _sum_over_shards(values: Tensor) -> Flow[Tensor]:
    (total,) = yield AllReduce((values,), "sum", axis="shard")
    return total


def _broadcast(values: Mapping[str, Tensor]) -> Flow[dict[str, Tensor]]:
    reply = yield Broadcast(tuple(values.values()), source=0)
    return dict(zip(values, reply, strict=True))
