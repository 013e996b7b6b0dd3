"""Which replicas a run has: `Fixed`, the same from beginning to end, or `Elastic`, members that come and go.

A method never asks which of the two it has; `Elastic` is in `dtrain.comm.runtime.membership.elastic`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from dtrain.comm.channel import Channel
from dtrain.comm.ops import Axis
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.agreement import begin_alike, gathered, require_agreement
from dtrain.comm.runtime.consistency import Verdict


class Membership(Protocol):
    """The replicas of a run."""

    @property
    def votes(self) -> Channel:
        """The channel for votes within this replica."""

    @property
    def together(self) -> tuple[Axis, ...]:
        """The axes along which all ranks evaluate together."""

    def begin(self, description: str, spec: str, identity: str) -> None:
        """Check that all replicas were given the same method and model, then make their parameters equal.

        ``identity``: what a newcomer must have in common with the run; empty: the other two.
        Raises ``ValueError`` where replicas were given different ones.
        """

    def gather_number(self, number: int) -> tuple[list[int], list[int]]:
        """``number`` from each replica that must agree, and from each rank of this one. Every rank must call it."""

    def saves_alike(self, saves: int) -> int:
        """How often every replica must have saved its state, where this one did ``saves`` times; 0: any number."""

    def compared(self, compare: Callable[[], Verdict]) -> Verdict:
        """``compare()``; a verdict without differences if a peer is lost meanwhile."""

    def leave(self) -> None:
        """Called after the last step, before the channels are closed."""

    def close(self) -> None:
        """Called after the channels are closed."""


class Fixed:
    """The same replicas from beginning to end."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self.votes = pieces.channel
        sharded = "shard" in pieces.channel.places
        self.together: tuple[Axis, ...] = ("shard", "replicate") if sharded else ("replicate",)

    def begin(self, description: str, spec: str, identity: str) -> None:
        require_agreement(description, spec, self._pieces)
        begin_alike(self._pieces)

    def gather_number(self, number: int) -> tuple[list[int], list[int]]:
        value, channel = torch.tensor([number]), self._pieces.channel
        shards = channel.run(gathered(value, "shard"), "agreement")
        return channel.run(gathered(value), "agreement").flatten().tolist(), shards.flatten().tolist()

    def saves_alike(self, saves: int) -> int:
        return saves

    def compared(self, compare: Callable[[], Verdict]) -> Verdict:
        return compare()

    def leave(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to close."""
