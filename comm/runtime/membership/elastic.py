"""The `Membership` of an elastic run: how a replica enters an epoch, votes within itself, and leaves.

How the members of an epoch exchange and copy state is each method's own: `elastic_rounds`, `elastic_machines`.
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
    """What was received from a donor cannot be its state."""


class Elastic:
    """This replica in an elastic run. The constructor enters an epoch.

    ``position``: how far this replica is, in the method's own count; NOBODY before it begins. ``newcomer``: whether the
    run had begun when this replica joined. ``channels``: those between replicas. ``take_back``: called when an epoch is
    left, to roll back exchanges under way.
    """

    together: tuple[Axis, ...] = ("shard",)  # a replica evaluates when it likes

    def __init__(self, pieces: Pieces, members: Members) -> None:
        self._pieces, self.members = pieces, members
        self.channels: list[Channel] = [pieces.channel]
        self.position = NOBODY
        self.take_back: Callable[[], None] = lambda: None
        self._refused = 0  # consecutive times that a donor's state was refused
        # For votes within the replica, which a lost peer does not break.
        shard = pieces.channel.transports["shard"].clone()
        within: dict[Axis, Transport] = {"replicate": SelfTransport(), "shard": shard}
        self.votes = Channel(within, pieces.channel.meter)
        members.join(pieces.channel.places["shard"], self._from_first)
        while not self.agree_in_replica(self.enter()):
            self.break_off()
        self.newcomer = members.epoch is not None and members.epoch.donor != NOBODY

    def agree_in_replica(self, ok: bool) -> bool:
        """Whether ``ok`` holds on every rank of this replica. Every rank must call it."""
        return not bool(sum_over_shards(self.votes, torch.tensor([0.0 if ok else 1.0]), "agree"))

    # ---- epochs ------------------------------------------------------------------------------------------------------

    def enter(self) -> bool:
        """Enter the next epoch; False if one of its members was lost."""
        try:
            self.members.enter(self.position)
        except PeersLost:
            return False
        for channel in self.channels:
            channel.renew()
        return True

    def break_off(self) -> None:
        """Abort this epoch's exchanges."""
        self.members.leave()
        for channel in self.channels:
            channel.renew()
        self.take_back()

    def regroup(self, catch_up: Callable[[], bool]) -> None:
        """Enter epochs until ``catch_up()`` succeeds on all ranks of this replica."""
        entered = False
        while not entered:
            self.break_off()
            entered = self.agree_in_replica(self.enter() and catch_up())

    def survived(self, transfer: Callable[[], None], unfit: tuple[type[Exception], ...] = (Unfit,)) -> bool:
        """Whether ``transfer()``, between members, succeeded; False if one was lost, or for an ``unfit`` state.

        Raises the error of an ``unfit`` state after MOST_REFUSED in a row.
        """
        try:
            transfer()
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

    def _from_first(self, number: int) -> int:
        return int(sum_over_shards(self.votes, torch.tensor([number], dtype=torch.int64), "members"))

    # ---- the Membership ----------------------------------------------------------------------------------------------

    def begin(self, description: str, spec: str, identity: str) -> None:
        """Raises ``ValueError`` unless the first replica of the run has the same ``identity``."""
        first = self.members.first_text(identity)
        if first != identity:
            raise ValueError(
                f"this replica was given another sync, seed or model ({unlike(identity, first)}) than the run that "
                f"it wants to join ({unlike(first, identity)}); give all the same, or name another run"
            )
        if not self.newcomer:
            require_agreement(description, spec, self._pieces)
            begin_alike(self._pieces)

    def gather_number(self, number: int) -> tuple[list[int], list[int]]:
        return [number], [number]  # members that are behind catch up at the next epoch

    def saves_alike(self, saves: int) -> int:
        return 0  # newcomers have missed the others' saves

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
