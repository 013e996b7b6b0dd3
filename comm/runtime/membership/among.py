"""What syncs among `Members` have in common: how they join, vote, and leave; the rest is each one's own."""

from __future__ import annotations

import logging
from abc import abstractmethod

import torch

from dtrain.comm.channel import Channel
from dtrain.comm.ops import Axis
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.membership.members import NOBODY, Members
from dtrain.comm.runtime.saved import unlike
from dtrain.comm.transports.gloo import PeersLost
from dtrain.comm.transports.transport import SelfTransport, Transport

log = logging.getLogger(__name__)

MOST_REFUSED = 3


class Unfit(ValueError):
    """What a donor handed over cannot be its state."""


class AmongMembers(Attached):
    """To be mixed in before another `Attached`, whose constructor is called between `_join` and the first exchange."""

    members: Members
    newcomer: bool
    """Whether the others had begun when this replica came."""
    refused = 0
    """How often in a row what a donor handed over did not fit; nothing of it was taken."""

    def detach(self) -> None:
        self.members.leave()
        super().detach()
        self._within.close()
        self.members.close()

    def _join(self, pieces: Pieces, members: Members) -> None:
        """Get into an epoch."""
        self.pieces, self.members = pieces, members
        # Votes within the replica, which no lost peer disturbs.
        within: dict[Axis, Transport] = {
            "replicate": SelfTransport(),
            "shard": pieces.channel.transports["shard"].clone(),
        }
        self._within = Channel(within, pieces.channel.meter)
        members.join(pieces.channel.places["shard"], self._told_by_the_first)
        while not self._agree(self._entered()):
            self._break_off()
        self.newcomer = members.epoch is not None and members.epoch.donor != NOBODY

    @abstractmethod
    def _position(self) -> int:
        """How far this replica is, NOBODY for one that has not begun."""

    def _channels(self) -> list[Channel]:
        """Those that go between replicas."""
        return [self.pieces.channel]

    def _entered(self) -> bool:
        """Enter the next epoch; False if it came to nothing."""
        try:
            self.members.enter(self._position())
        except PeersLost:
            return False
        for channel in self._channels():
            channel.renew()
        return True

    def _break_off(self) -> None:
        """Leave what is under way in this epoch."""
        self.members.leave()
        for channel in self._channels():
            channel.renew()

    def _refuse(self, error: Exception) -> None:
        """Go on without what was handed over, and ask again; raise ``error`` where that does not help."""
        self.refused += 1
        log.warning("replica %d refuses what was handed over: %s", self.members.id, error)
        if self.refused >= MOST_REFUSED:
            raise error

    def _require_same_run(self, mine: str) -> None:
        """Raise ``ValueError`` unless the first replica of the run said the same of itself."""
        first = self.members.first_said(mine)
        if first != mine:
            raise ValueError(
                f"this replica was given another sync or another model ({unlike(mine, first)}) than the run that it "
                f"wants to join ({unlike(first, mine)}); give all the same, or name another run"
            )

    @property
    def _alike(self) -> tuple[Axis, ...]:
        return ("shard",)  # a replica looks when it likes

    @property
    def _votes(self) -> Channel:
        return self._within

    def _saves_alike(self) -> int:
        return 0  # newcomers were not there when the others were asked

    def _told_by_all(self, number: int) -> tuple[list[int], list[int]]:
        return [number], [number]  # whoever is behind catches up where members meet

    def _told_by_the_first(self, number: int) -> int:
        return int(self._over_shards(torch.tensor([number], dtype=torch.int64), "members"))
