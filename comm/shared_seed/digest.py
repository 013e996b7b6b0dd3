"""A digest of every element of a model that its shards can sum up: equal weights have equal digests, on any mesh.

    sum over all elements of  mix(bits of the fp32 value, FQN, index in the unsharded parameter)      modulo 2^64

The sum does not depend on the order or the sharding, so a sharded model needs one all-reduce of 8 bytes. It detects a
single different bit. It does not protect against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.comm.layout import Named, Segment

_ODD = (0x1F3D5B79ACE02467, 0x2545F4914F6CDD1D)  # multipliers; products are taken modulo 2^64


def partial(values: Named, segments: Mapping[str, Segment]) -> Tensor:
    """This rank's share of the sum over flat fp32 ``values``: int64 ``[1]``, to be summed modulo 2^64."""
    total = torch.zeros(1, dtype=torch.int64)
    for fqn, value in values.items():
        segment = segments[fqn]
        bits = value.detach().float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        index = torch.arange(segment.offset, segment.stop, dtype=torch.int64, device=value.device)
        of_name = int.from_bytes(hashlib.blake2b(fqn.encode(), digest_size=7).digest(), "little")
        mixed = _mix(_mix(index + of_name) ^ bits)
        total += mixed.sum().cpu()
    return total


def unsigned(total: Tensor) -> int:
    """The digest as a number in [0, 2^64)."""
    return int(total.item()) % 2**64


def signed(digest: int) -> int:
    """A digest as int64 holds it; ``% 2**64`` undoes it."""
    return digest - 2**64 if digest >= 2**63 else digest


def _mix(x: Tensor) -> Tensor:
    """Spread every bit over all others, as in a 64-bit finalizer; shifts are made logical by masks."""
    x = (x ^ ((x >> 32) & 0xFFFFFFFF)) * _ODD[0]
    x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * _ODD[1]
    return x ^ ((x >> 32) & 0xFFFFFFFF)
