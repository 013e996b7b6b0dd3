"""Replicas that come and go, as a `Membership`: how they get into an epoch, agree within a replica, and leave.

What they do for each other in an epoch is each method's own: `elastic_rounds`, `elastic_steps`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from dtrain.comm.channel import Channel
from dtrain.comm.ops import Axis
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.agreement import begin_alike, require_agreement, sum_over_shards
from dtrain.comm.runtime.consistency import Verdict
from dtrain.comm.runtime.membership.members import NOBODY, Members
from dtrain.comm.runtime.saved import unlike
from dtrain.comm.transports.gloo import PeersLost, is_loss
from dtrain.comm.transports.transport import SelfTransport, Transport

log = logging.getLogger(__name__)

MOST_REFUSED = 3


class Unfit(ValueError):
    """What a donor handed over cannot be its state."""


class Elastic:
    """This replica among others that come and go. Constructed, it is in an epoch.

    ``position``: how far this replica is, in the method's own count; NOBODY for one that has not begun. ``newcomer``:
    whether the others had begun when this replica came. ``channels``: those that go between replicas. ``take_back``:
    called where an epoch is left, for what is under way in it.
    """

    together: tuple[Axis, ...] = ("shard",)  # a replica evaluates when it likes

    def __init__(self, pieces: Pieces, members: Members) -> None:
        self._pieces, self.members = pieces, members
        self.channels: list[Channel] = [pieces.channel]
        self.position = NOBODY
        self.take_back: Callable[[], None] = lambda: None
        self._refused = 0  # how often in a row what a donor handed over did not fit; nothing of it was taken
        # Votes within the replica, which no lost peer disturbs.
        shard = pieces.channel.transports["shard"].clone()
        within: dict[Axis, Transport] = {"replicate": SelfTransport(), "shard": shard}
        self.votes = Channel(within, pieces.channel.meter)
        members.join(pieces.channel.places["shard"], self._told_by_the_first)
        while not self.agree(self.enter()):
            self.break_off()
        self.newcomer = members.epoch is not None and members.epoch.donor != NOBODY

    def agree(self, ok: bool) -> bool:
        """Whether ``ok`` holds on every rank of this replica. Every rank must call it."""
        return not bool(sum_over_shards(self.votes, torch.tensor([0.0 if ok else 1.0]), "agree"))

    # ---- epochs ------------------------------------------------------------------------------------------------------

    def enter(self) -> bool:
        """Enter the next epoch; False if it came to nothing."""
        try:
            self.members.enter(self.position)
        except PeersLost:
            return False
        for channel in self.channels:
            channel.renew()
        return True

    def break_off(self) -> None:
        """Leave what is under way in this epoch."""
        self.members.leave()
        for channel in self.channels:
            channel.renew()
        self.take_back()

    def regroup(self, catch_up: Callable[[], bool]) -> None:
        """Into the next epoch in which ``catch_up()`` succeeds on all ranks of this replica."""
        entered = False
        while not entered:
            self.break_off()
            entered = self.agree(self.enter() and catch_up())

    def survived(self, hand_over: Callable[[], None], unfit: tuple[type[Exception], ...] = (Unfit,)) -> bool:
        """Whether ``hand_over()``, between members, came to its end: False if one was lost, or gave what is ``unfit``.

        Raises what was wrong with that where asking again does not help.
        """
        try:
            hand_over()
        except unfit as error:
            self._refused += 1
            log.warning("replica %d refuses what was handed over: %s", self.members.id, error)
            if self._refused >= MOST_REFUSED:
                raise
            return False
        except RuntimeError as error:
            if not is_loss(error):
                raise
            return False
        self._refused = 0
        return True

    def _told_by_the_first(self, number: int) -> int:
        return int(sum_over_shards(self.votes, torch.tensor([number], dtype=torch.int64), "members"))

    # ---- what every method asks --------------------------------------------------------------------------------------

    def begin(self, description: str, spec: str, identity: str) -> None:
        """Raises ``ValueError`` unless the first replica of the run said the same of itself."""
        first = self.members.first_said(identity)
        if first != identity:
            raise ValueError(
                f"this replica was given another sync or another model ({unlike(identity, first)}) than the run that "
                f"it wants to join ({unlike(first, identity)}); give all the same, or name another run"
            )
        if not self.newcomer:
            require_agreement(description, spec, self._pieces)
            begin_alike(self._pieces)

    def told_by_all(self, number: int) -> tuple[list[int], list[int]]:
        return [number], [number]  # whoever is behind catches up where members meet

    def saves_alike(self, saves: int) -> int:
        return 0  # newcomers were not there when the others were asked

    def compared(self, compare: Callable[[], Verdict]) -> Verdict:
        try:
            return compare()
        except RuntimeError as error:
            if not is_loss(error):
                raise
            self.break_off()  # the next round finds a new epoch
            return Verdict([])

    def leave(self) -> None:
        self.members.leave()

    def close(self) -> None:
        self.votes.close()
        self.members.close()
