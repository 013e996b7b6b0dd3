"""`one_byte` in an elastic run: newcomers catch up by the update log.

A step is a transaction. A machine keeps its bytes until it has those of all, so where one is lost, the others agree on
who is left (`Members`), gather again, and make the step without it; no parameter has moved meanwhile. A newcomer sends
the digest of its weights. If a member's log has that digest, the newcomer may replay the log from there; if not, or if
that takes longer than copying the weights, it copies them. Both times are measured: the bandwidth of the link from that
member, and how fast this machine generates directions. A machine that missed a step of the others does the same.
The record of a step lists its machines: ids are never used twice, and a machine's directions belong to its id.
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
"""A bound of a record's size in a log, without its machines and their bytes."""
ASK_EVERY = 10
"""Steps between two checks for newcomers: a check takes some round trips to the store."""


class ElasticMachines:
    """This machine among members, for `dtrain.comm.methods.one_byte`.

    The membership's ``position`` is the step that this machine is at.
    """

    def __init__(self, walk: Walk, folder: str, context: Context, membership: Elastic) -> None:
        self.walk, self._folder, self._context, self._membership = walk, folder, context, membership
        self.records: list[Record] = []  # since this machine joined
        self._checked_at, self._first_step, self._first = 0, 0, self._context.digest()
        self.log = None if membership.newcomer else self._log_of(self._first)

    def begin(self) -> None:
        """Before the first step: a newcomer catches up with the others."""
        if not self._membership.newcomer:
            self._membership.position = 0
            return
        self._context.steps = self._membership.position = NOBODY
        if not self._membership.agree_in_replica(self._caught_up()):
            self._regroup()

    @property
    def number(self) -> int:
        return self._membership.members.id

    def exchange(self, codes: Tensor) -> Gathered | None:
        """With all members, after newcomers were let in."""
        context, membership, before = self._context, self._membership, self._context.steps
        membership.position = before
        if before % ASK_EVERY == 0 and self._checked_at != before:
            self._checked_at = before
            if not membership.agree_in_replica(not membership.members.called(before)):
                self._regroup()
        while context.steps == before:
            all_codes = self.gathered(codes, "bytes")
            if membership.agree_in_replica(all_codes is not None):
                assert all_codes is not None and membership.members.epoch is not None
                epoch = membership.members.epoch
                return Gathered(all_codes, epoch.number, tuple(sorted(epoch.slots)))
            self._regroup()  # which may catch up with a step that the others have made
        context.steps -= 1  # the caller counts the step
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
        if self.records:  # the first log has the steps before weights were copied
            path = path.with_stem(f"{path.stem}-{self._first_step}")
        return UpdateLog(path, Header(self.walk, dict(self._context.pieces.shapes), first))

    # ---- where machines wait for each other --------------------------------------------------------------------------

    def _regroup(self) -> None:
        """Enter the next epoch, in which members that are behind catch up."""
        self._membership.regroup(self._caught_up)

    def _caught_up(self) -> bool:
        """Bring members that are behind to the donor's step; False if one of them was lost."""
        members = self._membership.members
        epoch, me = members.epoch, members.id
        if epoch is None or not epoch.behind or me not in (epoch.donor, *epoch.behind):
            return True
        together, donor = sorted([epoch.donor, *epoch.behind]), epoch.donor

        def transfer() -> None:
            with members.between(together) as transport:
                channel = Channel({"replicate": transport}, self._context.meter)
                try:
                    (self._donate if me == donor else self._catch_up)(channel, together.index(donor))
                finally:
                    channel.close()

        if not self._membership.survived(transfer, (Unfit, LogError)):
            return False
        self._checked_at = self._context.steps
        return True

    def _donate(self, channel: Channel, source: int) -> None:
        """The donor's side: send the log's tail, and the weights where a digest is not in the log."""
        steps = {record.digest: record.step.number + 1 for record in self.records} | {self._first: self._first_step}
        digests = channel.run(gathered(torch.tensor([signed(self._last)])), "hand-over").flatten().tolist()
        places = [steps.get(digest % 2**64, NOBODY) for digest in digests]
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
        """The side of a member that is behind: replay the log, or copy the donor's weights."""
        place, values = channel.places["replicate"], self._context.pieces.read()
        channel.run(gathered(torch.tensor([signed(self._context.digest())])), "hand-over")
        (about,) = channel.run(_from(source, torch.zeros(2 + place.size, dtype=torch.int64)), "hand-over")
        donor_step, tail_bytes, *places = about.tolist()
        self._require_possible(donor_step, tail_bytes, places)
        step = places[place.rank]
        started = time.perf_counter()
        channel.run(_from(source, torch.zeros(PROBE, dtype=torch.uint8)), "hand-over")
        copying = (time.perf_counter() - started) / PROBE * 4 * sum(value.numel() for value in values.values())
        directions = (donor_step - step) * self.walk.samples * self._membership.members.place.size
        walking = directions * self._direction_seconds()
        came_now = self._membership.newcomer and not self._membership.members.came_by
        by_log = self._membership.agree_in_replica(
            step != NOBODY and (not came_now or walking < copying)
        )  # members lack one step
        copies = channel.run(gathered(torch.tensor([int(not by_log)])), "hand-over")
        (tail,) = channel.run(_from(source, torch.zeros(max(1, tail_bytes), dtype=torch.uint8)), "hand-over")
        copied = channel.run(_from(source, *values.values()), "hand-over") if copies.any() else ()
        if by_log:
            if came_now:
                self._begin_at(step)
            start = min(place for place in places if place != NOBODY)
            records = from_bytes(tail.numpy().tobytes()[:tail_bytes], range(start, donor_step))
            self._replay(values, [record for record in records if record.step.number >= step])
        else:
            self._context.pieces.write(dict(zip(values, copied, strict=True)))
            self._begin_at(donor_step)
        self._context.steps = self._membership.position = donor_step
        if came_now:
            self._membership.members.came_by = "log" if by_log else "weights"

    def _require_possible(self, donor_step: int, tail_bytes: int, places: list[int]) -> None:
        """Raise `Unfit` for values that a donor cannot have."""
        epoch = self._membership.members.epoch
        assert epoch is not None
        stands = self._membership.members.position_of(epoch.donor)
        most = max(0, donor_step) * (RECORD_BYTES + (2 + self.walk.samples) * self._membership.members.arrivals)
        if donor_step < 0 or stands not in (None, donor_step) or not 0 <= tail_bytes <= most:
            raise Unfit(
                f"it says that it is at step {donor_step} (the store: {stands}), with {tail_bytes} bytes of its log"
            )
        if not all(NOBODY <= place <= donor_step for place in places):
            raise Unfit(
                f"it says that the weights of those who are behind are of the steps {places}, and is at {donor_step}"
            )

    def _replay(self, values: Named, records: list[Record]) -> None:
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
        """Begin this machine's log anew, with its present weights."""
        self._first_step, self._first = step, self._context.digest()
        if self.log is not None:
            self.log.close()
        self.log, self.records = self._log_of(self._first), []

    @property
    def _last(self) -> int:
        """The digest of this machine's weights after the last recorded step."""
        return self.records[-1].digest if self.records else self._first

    def _direction_seconds(self) -> float:
        """Seconds to move the parameters along one direction on this machine."""
        values = self._context.pieces.read()
        started = time.perf_counter()
        move(values, self._context.pieces.segments, self.walk, [((0, 0, 0), 1.0)])
        return time.perf_counter() - started


def _from(source: int, *tensors: Tensor) -> Flow[tuple[Tensor, ...]]:
    """The ``tensors`` of the rank ``source``; other ranks give any of the same shapes."""
    reply = yield Broadcast(tensors, source)
    return tuple(reply)
