"""One byte among machines that come and go: the log is what lets them.

A step is a transaction. A machine keeps its bytes until it has everybody's, so where one is lost, the others agree on
who is left (`Members`), gather again, and take the step without it; nobody has moved meanwhile. One that comes says
what its weights' digest is. If a member's log knows it, the newcomer may take what the log says since then and walk it;
if not, or if that takes longer than copying the weights, it copies them. Both are measured: how fast the link from that
member is, and how fast this machine makes directions. One that missed a step that others have taken does the same.
Who takes part in a step is in its record: ids are never used twice, and a machine's directions belong to its id.
Communication: that of `one_byte`; for a newcomer a probe of 256 KiB, then the log's tail or the weights.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.layout import Named
from dtrain.comm.ops import Broadcast, Flow
from dtrain.comm.runtime.agreement import gathered
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.membership.elastic import Elastic, Unfit
from dtrain.comm.runtime.membership.machines import Gathered
from dtrain.comm.runtime.membership.members import NOBODY
from dtrain.comm.shared_seed.digest import signed
from dtrain.comm.shared_seed.directions import Walk, move, walk_on
from dtrain.comm.shared_seed.update_log import Header, LogError, Record, UpdateLog, from_bytes, to_bytes
from dtrain.comm.transports.gloo import is_loss

PROBE = 1 << 18
RECORD_BYTES = 64
"""More than a record takes in a log, without its machines and their bytes."""
ASK_EVERY = 10
"""Steps between two looks for newcomers: a look takes some round trips to the store."""


class ElasticMachines:
    """This machine among members, for `dtrain.comm.methods.one_byte`.

    The membership's ``position`` is the step that this machine is at.
    """

    def __init__(self, walk: Walk, folder: str, context: Context, membership: Elastic) -> None:
        self.walk, self._folder, self._context, self._membership = walk, folder, context, membership
        self.records: list[Record] = []  # since this machine came
        self._asked, self._first_step, self._first = 0, 0, self._context.digest()
        self.log = None if membership.newcomer else self._log_of(self._first)

    def begin(self) -> None:
        """Before the first step: a newcomer catches up with the others."""
        if not self._membership.newcomer:
            self._membership.position = 0
            return
        self._context.steps = self._membership.position = NOBODY
        if not self._membership.agree(self._handed_on()):
            self._regroup()

    @property
    def number(self) -> int:
        return self._membership.members.id

    def exchange(self, codes: Tensor) -> Gathered | None:
        """With whoever is there. Newcomers are let in before it."""
        context, membership, before = self._context, self._membership, self._context.steps
        membership.position = before
        if before % ASK_EVERY == 0 and self._asked != before:
            self._asked = before
            if not membership.agree(not membership.members.called(before)):
                self._regroup()
        while context.steps == before:
            everybody = self.gathered(codes, "bytes")
            if membership.agree(everybody is not None):
                assert everybody is not None and membership.members.epoch is not None
                epoch = membership.members.epoch
                return Gathered(everybody, epoch.number, tuple(sorted(epoch.slots)))
            self._regroup()  # which may bring what the others have done in this step
        context.steps -= 1  # the step is counted by whoever asked for it
        return None

    def gathered(self, value: Tensor, label: str) -> Tensor | None:
        try:
            return self._context.pieces.channel.run(gathered(value), label)
        except RuntimeError as error:
            if not is_loss(error):
                raise
            return None

    def keep(self, record: Record) -> None:
        if self.log is not None:
            self.log.append(record)
        self.records.append(record)

    def go_on(self, digest: int) -> None:
        if self.log is not None:
            self.log.go_on(self._context.steps, digest)

    def detach(self) -> None:
        if self.log is not None:
            self.log.close()

    def _log_of(self, first: int) -> UpdateLog | None:
        if self._context.pieces.channel.places["shard"].rank:
            return None
        path = Path(self._folder) / f"machine-{self.number}.log"
        if self.records:  # of what came before weights were copied
            path = path.with_stem(f"{path.stem}-{self._first_step}")
        return UpdateLog(path, Header(self.walk, dict(self._context.pieces.shapes), first))

    # ---- where machines wait for each other --------------------------------------------------------------------------

    def _regroup(self) -> None:
        """Into the next epoch; who is behind, or comes, catches up."""
        self._membership.regroup(self._handed_on)

    def _handed_on(self) -> bool:
        """Bring those who are behind to where the donor is; False if one of them was lost."""
        members = self._membership.members
        epoch, me = members.epoch, members.id
        if epoch is None or not epoch.behind or me not in (epoch.donor, *epoch.behind):
            return True
        together, donor = sorted([epoch.donor, *epoch.behind]), epoch.donor

        def hand_over() -> None:
            with members.between(together) as transport:
                channel = Channel({"replicate": transport}, self._context.meter)
                try:
                    (self._hand_on if me == donor else self._catch_up)(channel, together.index(donor))
                finally:
                    channel.close()

        if not self._membership.survived(hand_over, (Unfit, LogError)):
            return False
        self._asked = self._context.steps
        return True

    def _hand_on(self, channel: Channel, source: int) -> None:
        """The donor's part. What its log does not know gets all weights."""
        known = {record.digest: record.step.number + 1 for record in self.records} | {self._first: self._first_step}
        digests = channel.run(gathered(torch.tensor([signed(self._last)])), "hand-over").flatten().tolist()
        places = [known.get(digest % 2**64, NOBODY) for digest in digests]
        start = min((place for place in places if place != NOBODY), default=self._context.steps)
        tail = to_bytes(record for record in self.records if record.step.number >= start)
        about = torch.tensor([self._context.steps, len(tail), *places])
        channel.run(_from(source, about), "hand-over")
        channel.run(_from(source, torch.zeros(PROBE, dtype=torch.uint8)), "hand-over")
        copying = channel.run(gathered(torch.zeros(1, dtype=torch.int64)), "hand-over")
        channel.run(_from(source, torch.frombuffer(bytearray(tail or b"-"), dtype=torch.uint8)), "hand-over")
        if copying.any():
            channel.run(_from(source, *self._context.pieces.read().values()), "hand-over")

    def _catch_up(self, channel: Channel, source: int) -> None:
        """The part of one that is behind: along the log, or with the donor's weights."""
        place, values = channel.places["replicate"], self._context.pieces.read()
        channel.run(gathered(torch.tensor([signed(self._context.digest())])), "hand-over")
        (about,) = channel.run(_from(source, torch.zeros(2 + place.size, dtype=torch.int64)), "hand-over")
        there, tail_bytes, *places = about.tolist()
        self._require_possible(there, tail_bytes, places)
        here = places[place.rank]
        started = time.perf_counter()
        channel.run(_from(source, torch.zeros(PROBE, dtype=torch.uint8)), "hand-over")
        copying = (time.perf_counter() - started) / PROBE * 4 * sum(value.numel() for value in values.values())
        walking = (there - here) * self.walk.samples * self._membership.members.place.size * self._direction_seconds()
        came_now = self._membership.newcomer and not self._membership.members.came_by
        by_log = self._membership.agree(here != NOBODY and (not came_now or walking < copying))  # others lack a step
        copies = channel.run(gathered(torch.tensor([int(not by_log)])), "hand-over")
        (tail,) = channel.run(_from(source, torch.zeros(max(1, tail_bytes), dtype=torch.uint8)), "hand-over")
        copied = channel.run(_from(source, *values.values()), "hand-over") if copies.any() else ()
        if by_log:
            if came_now:
                self._begin_at(here)
            start = min(place for place in places if place != NOBODY)
            records = from_bytes(tail.numpy().tobytes()[:tail_bytes], range(start, there))
            self._walk_along(values, [record for record in records if record.step.number >= here])
        else:
            self._context.pieces.write(dict(zip(values, copied, strict=True)))
            self._begin_at(there)
        self._context.steps = self._membership.position = there
        if came_now:
            self._membership.members.came_by = "log" if by_log else "weights"

    def _require_possible(self, there: int, tail_bytes: int, places: list[int]) -> None:
        """Raise `Unfit` for what the donor cannot say of itself."""
        epoch = self._membership.members.epoch
        assert epoch is not None
        stands = self._membership.members.stands(epoch.donor)
        most = max(0, there) * (RECORD_BYTES + (2 + self.walk.samples) * self._membership.members.arrivals)
        if there < 0 or stands not in (None, there) or not 0 <= tail_bytes <= most:
            raise Unfit(f"it says that it is at step {there} (the store: {stands}), with {tail_bytes} bytes of its log")
        if not all(NOBODY <= place <= there for place in places):
            raise Unfit(
                f"it says that the weights of those who are behind are of the steps {places}, and is at {there}"
            )

    def _walk_along(self, values: Named, records: list[Record]) -> None:
        for record in records:
            walk_on(values, self._context.pieces.segments, self.walk, record.step)
            digest = self._context.digest(values)
            if digest != record.digest:
                raise RuntimeError(
                    f"after step {record.step.number} of the log that was received the weights have the digest "
                    f"{digest:016x} here, and {record.digest:016x} where they come from; look at memory and processors"
                )
            self.keep(record)
        self._context.pieces.write(values)

    def _begin_at(self, step: int) -> None:
        """This machine's log begins with the weights that it has now."""
        self._first_step, self._first = step, self._context.digest()
        if self.log is not None:
            self.log.close()
        self.log, self.records = self._log_of(self._first), []

    @property
    def _last(self) -> int:
        """The digest of this machine's weights, as far as it was written down."""
        return self.records[-1].digest if self.records else self._first

    def _direction_seconds(self) -> float:
        """How long it takes to go along one direction here."""
        values = self._context.pieces.read()
        started = time.perf_counter()
        move(values, self._context.pieces.segments, self.walk, [((0, 0, 0), 1.0)])
        return time.perf_counter() - started


def _from(source: int, *own: Tensor) -> Flow[tuple[Tensor, ...]]:
    """The tensors of the rank ``source``; the others give some of the same shapes."""
    found = yield Broadcast(own, source)
    return tuple(found)
