"""Who is on the replicate axis, as a method sees it: the same replicas from beginning to end, or `Members`.

`Fixed` is the first; `dtrain.comm.runtime.membership.elastic.Elastic` the second. A method never asks which it has.
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
        """What votes within this replica go through."""

    @property
    def together(self) -> tuple[Axis, ...]:
        """The axes along which all ranks evaluate together."""

    def begin(self, description: str, spec: str, identity: str) -> None:
        """See that all were given the same, then begin alike.

        ``identity``: what a replica that comes later must have in common with the run; empty: the other two.
        Raises ``ValueError`` where they were not.
        """

    def told_by_all(self, number: int) -> tuple[list[int], list[int]]:
        """``number`` of all replicas that must agree, and of all ranks of this one. Every rank must call it."""

    def saves_alike(self, saves: int) -> int:
        """How often every replica must have been asked for its state, if this one was ``saves`` times; 0: no matter."""

    def compared(self, compare: Callable[[], Verdict]) -> Verdict:
        """``compare()``, or one replica that agrees with itself where a peer was lost meanwhile."""

    def leave(self) -> None:
        """No more steps will be made; before the channels are closed."""

    def close(self) -> None:
        """After the channels were closed."""


class Fixed:
    """The replicas that there are, from beginning to end."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self.votes = pieces.channel
        sharded = "shard" in pieces.channel.places
        self.together: tuple[Axis, ...] = ("shard", "replicate") if sharded else ("replicate",)

    def begin(self, description: str, spec: str, identity: str) -> None:
        require_agreement(description, spec, self._pieces)
        begin_alike(self._pieces)

    def told_by_all(self, number: int) -> tuple[list[int], list[int]]:
        value, channel = torch.tensor([number]), self._pieces.channel
        shards = channel.run(gathered(value, "shard"), "agreement")
        return channel.run(gathered(value), "agreement").flatten().tolist(), shards.flatten().tolist()

    def saves_alike(self, saves: int) -> int:
        return saves

    def compared(self, compare: Callable[[], Verdict]) -> Verdict:
        return compare()

    def leave(self) -> None:
        """Nobody waits for this one."""

    def close(self) -> None:
        """Nothing is left open."""
