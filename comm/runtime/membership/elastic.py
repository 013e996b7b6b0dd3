"""A local update among replicas that come and go.

What a replica sends of a round stays with it until all members have the result. So where one is lost, the others agree
on who is left (`Members`), send the same again, and go on: only what the lost replica had learned in this round is
gone. One that comes copies what is declared replicated (anchor, outer momentum, counters) from a member that is as far
as any, takes part in the round under way with a weight of zero, and trains on from the new anchor. Its inner optimizer
starts afresh. A member that missed the end of a round, since somebody died in that moment, does as newcomers do. One
that is slow may end its round with fewer steps, and counts by those that it made.

The place at which members wait for each other, once a round, is `_here`; every other step is a replica's own affair.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.layout import is_finite
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.ops import Broadcast, Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import Settled, begun
from dtrain.comm.runtime.consistency import Verdict
from dtrain.comm.runtime.loop import AttachedLocalUpdate
from dtrain.comm.runtime.membership.among import AmongMembers, Unfit
from dtrain.comm.runtime.membership.members import MOST_STEPS, NOBODY, Epoch, Members
from dtrain.comm.runtime.parts import NEVER, Flight, Part
from dtrain.comm.transports.gloo import is_loss

CHECKSUM = 4
"""Bytes of it at the end of what is handed over."""


class AttachedElastic(AmongMembers, AttachedLocalUpdate):
    """A `LocalUpdate` among members, at work on one rank. Made by ``attach(..., members=...)``.

    ``position``: how often it has been where members wait for each other. ``left_out_steps``: inner steps that this
    replica did not make since the others had waited long enough (``Members(grace_seconds=...)``).
    """

    def __init__(self, spec: LocalUpdate, pieces: Pieces, seed: int, members: Members) -> None:
        _require_elastic(spec)
        self.channel, self.position, self._closing, self.parts = pieces.channel, NOBODY, False, []
        self.left_out_steps = 0
        self._join(pieces, members)
        super().__init__(spec, pieces, seed)
        if self.newcomer:
            self._take_part()
        else:
            self.position = 0

    def settle(self) -> None:
        if any(flight.handles for part in self.parts for flight in part.flights):
            raise RuntimeError(
                f"step {self.steps}: a fragment is under way, and members may come or go until it has arrived; save "
                "where sync.quiet is True, as it is after each round that is waited for"
            )

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way: the only time at which a checkpoint can be taken."""
        return not any(part.flights for part in self.parts)

    def close_round(self) -> bool:
        self._closing = True
        return super().close_round()

    # ---- set-up ------------------------------------------------------------------------------------------------------

    def _begin(self, spec: str) -> None:
        self._require_same_run(f"{self.told}; all of it and the model: {self._agreement(spec).hex()}")
        if not self.newcomer:
            super()._begin(spec)

    def _position(self) -> int:
        return self.position

    def _after_step(self) -> None:
        super()._after_step()
        while self.members.grace < math.inf and not self._agree(not self.members.late(self.position)):
            self.steps += 1  # a step that is left out, since the others wait
            self.tokens -= 1
            self.left_out_steps += 1
            super()._after_step()

    # ---- where members wait for each other ---------------------------------------------------------------------------

    def _here(self) -> None:
        if self._awaited():
            called = not self._closing and self.members.called(self.position)
            if not self._agree(not called):
                self._regroup()
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        while not self._agree(self._arrived()):
            self._regroup()
        self.position += 1

    def _awaited(self) -> list[Part]:
        return [part for part in self.parts if part.flights] if self._closing else self._landing()

    def _compared(self) -> Verdict:
        try:
            return super()._compared()
        except RuntimeError as error:
            if not is_loss(error):
                raise
            self._break_off()  # the next round finds a new epoch
            return Verdict([])

    def _arrived(self) -> bool:
        """Wait for what is awaited; False if a peer was lost on its way."""
        try:
            for part in self._awaited():
                for handle in part.flights[0].handles:
                    handle.wait()
        except RuntimeError as error:
            if not is_loss(error):
                raise
            self._break_off()
            return False
        return True

    def _regroup(self) -> None:
        """Into the next epoch; those who are behind take over the state of one who is not; all send again."""
        entered = False
        while not entered:
            self._break_off()
            entered = self._agree(self._entered() and self._handed_on())
        self._send_again()

    def _take_part(self) -> None:
        """A newcomer's first round: what the others wait for, with nothing of its own in it."""
        if self._agree(self._handed_on()):
            self._send_again()
        else:
            self._regroup()
        self._wait_for_all()
        self._come_down()

    def _send_again(self) -> None:
        under_way = [(flight.captured, part.number, part, flight) for part in self.parts for flight in part.flights]
        for _, _, part, flight in sorted(under_way, key=lambda one: one[:2]):
            flight.branch = self.state.branch()
            self._launched(part, flight)

    def _break_off(self) -> None:
        super()._break_off()
        for part in self.parts:
            for flight in part.flights:
                flight.branch.rollback()
                flight.handles = []

    def _handed_on(self) -> bool:
        """Copy the donor's state to those who are behind; False if one of them was lost."""
        try:
            self._hand_on(self.members.epoch)
        except Unfit as error:
            self._refuse(error)
            return False
        except RuntimeError as error:
            if not is_loss(error):
                raise
            return False
        self.refused = 0
        return True

    def _channels(self) -> list[Channel]:
        return list({id(channel): channel for channel in (self.pieces.channel, self.channel)}.values())

    # ---- from a member to those who are behind -----------------------------------------------------------------------

    def _hand_on(self, epoch: Epoch | None) -> None:
        me = self.members.id
        if epoch is None or not epoch.behind or me not in (epoch.donor, *epoch.behind):
            return
        with self.members.between([epoch.donor, *epoch.behind]) as transport:
            channel = Channel({"replicate": transport}, self.meter)
            try:
                own = self._packed() if me == epoch.donor else None
                source = sorted([epoch.donor, *epoch.behind]).index(epoch.donor)
                found = channel.run(_copied(own, source, self._most_bytes()), "hand-over")
            finally:
                channel.close()
        if me != epoch.donor:
            self._unpack(found, self.members.stands(epoch.donor))

    def _most_bytes(self) -> int:
        """A bound of what can be handed over: for each element fp64 of each name, and the rest."""
        elements = sum(anchor.numel() for anchor in self._anchor(self.pieces.segments).values())
        return 8 * elements * (1 + len(self.state.kinds)) + (1 << 24)

    def _packed(self) -> Tensor:
        shared = {name for name, kind in self.state.kinds.items() if kind in ("replicated", "opaque")}
        tensors = {
            fqn: {name: tensor.cpu() for name, tensor in named.items() if name in shared}
            for fqn, named in self.state.tensors.items()
        }
        counters = {name: getattr(self, name) for name in self.counters}
        parts = [(part.captured, part.scalar, [flight.captured for flight in part.flights]) for part in self.parts]
        rates = [part.rates for part in self.parts]
        whole = {"tensors": tensors, "counters": counters, "parts": parts, "rates": rates, "position": self.position}
        buffer = io.BytesIO()
        torch.save(whole, buffer)
        content = buffer.getvalue()
        checked = content + zlib.crc32(content).to_bytes(CHECKSUM, "little")  # torch.load compares none
        return torch.frombuffer(bytearray(checked), dtype=torch.uint8)

    def _unpack(self, packed: Tensor, position: int | None) -> None:
        """Take it over, all or nothing. Raises `Unfit`. ``position``: where the donor told the store that it stands."""
        content, checksum = (part.numpy().tobytes() for part in packed.tensor_split([-CHECKSUM]))
        try:
            if zlib.crc32(content).to_bytes(CHECKSUM, "little") != checksum:
                raise ValueError("it was changed on its way")
            found = torch.load(io.BytesIO(content), weights_only=True)
            self._require_fitting(found, position)
        except Exception as error:  # whatever torch says of what is no archive
            told = str(error).partition("\n")[0]
            raise Unfit(f"it is no state of this run ({told}); do all replicas run the same version?") from error
        device = next(iter(self.pieces.read(copy=False).values()), torch.empty(0)).device
        tensors = cast(Mapping[str, Mapping[str, Tensor]], found["tensors"])
        moved = {fqn: {name: t.to(device) for name, t in named.items()} for fqn, named in tensors.items()}
        self.state.load(moved)
        for name, value in found["counters"].items():
            setattr(self, name, value)
        for part, (captured, scalar, flights), rates in zip(self.parts, found["parts"], found["rates"], strict=True):
            part.captured, part.scalar, part.rates, part.tokens = captured, scalar, tuple(rates), self.tokens
            nothing = {fqn: torch.zeros_like(anchor) for fqn, anchor in self._anchor(part.fqns).items()}
            part.flights = [
                Flight(at, self.state.branch(), [], sent=nothing, weight=0.0, products=[torch.zeros((), device=device)])
                for at in flights
            ]
        self.position = found["position"]
        self.pieces.write(self._anchor(self.pieces.segments))

    def _require_fitting(self, found: Mapping[str, Any], position: int | None) -> None:
        """Raise ``ValueError`` unless every part of it can be this sync's."""
        anchors = self._anchor(self.pieces.segments)
        tensors, counters, parts = found["tensors"], found["counters"], found["parts"]
        shapes = {fqn: (named["anchor"].shape, named["anchor"].dtype) for fqn, named in tensors.items()}
        wrong = {
            "position": not _number(found["position"]) or position not in (None, found["position"]),
            "counters": {*counters} != {*self.counters} or not all(map(_number, counters.values())),
            "parameters": shapes != {fqn: (anchor.shape, anchor.dtype) for fqn, anchor in anchors.items()},
            "names": not {name for named in tensors.values() for name in named} <= {*self.state.kinds},
            "values": not all(is_finite(tensor) for named in tensors.values() for tensor in named.values()),
            "parts": len(parts) != len(self.parts)
            or not all(
                _number(captured, NEVER) and math.isfinite(scalar) and all(map(_number, flights))
                for captured, scalar, flights in parts
            ),
            "rates": len(found["rates"]) != len(self.parts)
            or not all(
                _number(steps) and all(math.isfinite(rate) and rate >= 0 for rate in (mean, last, before))
                for mean, steps, last, before in found["rates"]
            ),
        }
        if any(wrong.values()):
            raise ValueError(f"its {' and '.join(name for name, bad in wrong.items() if bad)} cannot be")


def _number(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < MOST_STEPS


def _copied(own: Tensor | None, source: int, most: int) -> Flow[Tensor]:
    """The bytes of the rank ``source``; the others have None. Raises `Unfit` for more than ``most``."""
    (size,) = yield Broadcast((torch.tensor([own.numel() if own is not None else 0]),), source)
    if own is None and not 0 < int(size) <= most:
        raise Unfit(f"it says that it has {int(size)} bytes, and a state of this model has {most} at most")
    (found,) = yield Broadcast((own if own is not None else torch.empty(int(size), dtype=torch.uint8),), source)
    return found


def _require_elastic(spec: LocalUpdate) -> None:
    """Raise ``ValueError`` for what keeps replicas together between their rounds."""
    reasons = {
        "delay": spec.delay != "none",
        f"outer_state={spec.outer_state!r}": spec.outer_state != "replicated",
        "warmup_steps": spec.warmup_steps > 0,
        "a knob that is 'auto'": spec.auto is not None,
        "a plan that changes by itself": not isinstance(begun(spec.plan, []), Settled),
        "feedback that keeps the replicas' mean": not spec.weighs,
    }
    wrong = [what for what, found in reasons.items() if found]
    if type(spec) is not LocalUpdate:
        wrong.insert(0, f"{type(spec).__name__}'s own way of rounds")
    if wrong:
        raise ValueError(
            f"replicas cannot come and go with {' and '.join(wrong)}; leave it out, as in diloco(...) and "
            "streaming_diloco(...) with a compressor or error_feedback(...)"
        )
