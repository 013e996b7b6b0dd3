"""The rounds of a local update among replicas that come and go.

What a replica sends of a round stays with it until all members have the result. So where one is lost, the others agree
on who is left (`Members`), send the same again, and go on: only what the lost replica had learned in this round is
gone. One that comes copies what is declared replicated (anchor, outer momentum, counters) from a member that is as far
as any, takes part in the round under way with a weight of zero, and trains on from the new anchor. Its inner optimizer
starts afresh. A member that missed the end of a round, since somebody died in that moment, does as newcomers do. One
that is slow may end its round with fewer steps, and counts by those that it made.

Members wait for each other once a round (`ElasticRounds.wait`); other steps need no coordination.
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
from dtrain.comm.ops import Broadcast, Flow
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.loop import LocalUpdateLoop
from dtrain.comm.runtime.membership.elastic import Elastic, Unfit
from dtrain.comm.runtime.membership.members import MOST_STEPS, Epoch
from dtrain.comm.runtime.rounds import NEVER, Fragment, Reduction
from dtrain.comm.runtime.saved_state import COUNTERS
from dtrain.comm.transports.gloo import is_loss

CHECKSUM = 4
"""Bytes of it at the end of what is handed over."""


class ElasticRounds:
    """A `Meeting` of members. The membership's ``position`` counts the meetings that this replica has been at."""

    def __init__(self, membership: Elastic, context: Context) -> None:
        self.membership, self._context = membership, context

    def begin(self, loop: LocalUpdateLoop) -> None:
        """Before the first step of ``loop``: a newcomer takes part in the round under way."""
        membership = self.membership
        if loop.channel not in membership.channels:
            membership.channels.append(loop.channel)
        membership.take_back = lambda: _take_back(loop)
        if not membership.newcomer:
            membership.position = 0
            return
        # What the others wait for, with nothing of its own in it.
        if membership.agree(self._handed_on(loop)):
            _send_again(loop)
        else:
            self._regroup(loop)
        self._wait_for_all(loop, closing=False)
        loop.end_rounds()

    # ---- what a loop asks --------------------------------------------------------------------------------------------

    def require_quiet(self, loop: LocalUpdateLoop) -> None:
        if any(reduction.handles for fragment in loop.under_way() for reduction in fragment.reductions):
            raise RuntimeError(
                f"step {self._context.steps}: a fragment is under way, and members may come or go until it has "
                "arrived; save where sync.quiet is True, as it is after each round that is waited for"
            )

    def wait(self, loop: LocalUpdateLoop, *, closing: bool = False) -> None:
        membership = self.membership
        if _awaited(loop, closing):
            called = not closing and membership.members.called(membership.position)
            if not membership.agree(not called):
                self._regroup(loop)
            self._wait_for_all(loop, closing=closing)

    def leaves_out(self) -> bool:
        membership = self.membership
        if membership.members.grace == math.inf:
            return False
        late = not membership.agree(not membership.members.late(membership.position))
        membership.members.left_out_steps += late
        return late

    # ---- where members wait for each other ---------------------------------------------------------------------------

    def _wait_for_all(self, loop: LocalUpdateLoop, *, closing: bool) -> None:
        while not self.membership.agree(self._arrived(loop, closing)):
            self._regroup(loop)
        self.membership.position += 1

    def _arrived(self, loop: LocalUpdateLoop, closing: bool) -> bool:
        """Wait for what is awaited; False if a peer was lost on its way."""
        try:
            for fragment in _awaited(loop, closing):
                for handle in fragment.reductions[0].handles:
                    handle.wait()
        except RuntimeError as error:
            if not is_loss(error):
                raise
            self.membership.break_off()
            return False
        return True

    def _regroup(self, loop: LocalUpdateLoop) -> None:
        """Into the next epoch; those who are behind take over the state of one who is not; all send again."""
        self.membership.regroup(lambda: self._handed_on(loop))
        _send_again(loop)

    def _handed_on(self, loop: LocalUpdateLoop) -> bool:
        """Copy the donor's state to those who are behind; False if one of them was lost."""
        return self.membership.survived(lambda: self._hand_on(loop, self.membership.members.epoch))

    # ---- from a member to those who are behind -----------------------------------------------------------------------

    def _hand_on(self, loop: LocalUpdateLoop, epoch: Epoch | None) -> None:
        members = self.membership.members
        if epoch is None or not epoch.behind or members.id not in (epoch.donor, *epoch.behind):
            return
        with members.between([epoch.donor, *epoch.behind]) as transport:
            channel = Channel({"replicate": transport}, self._context.meter)
            try:
                packed = self.packed(loop) if members.id == epoch.donor else None
                source = sorted([epoch.donor, *epoch.behind]).index(epoch.donor)
                packed = channel.run(_copied(packed, source, self._most_bytes(loop)), "hand-over")
            finally:
                channel.close()
        if members.id != epoch.donor:
            self.unpack(loop, packed, members.stands(epoch.donor))

    def _most_bytes(self, loop: LocalUpdateLoop) -> int:
        """A bound of what can be handed over: for each element fp64 of each name, and the rest."""
        elements = sum(anchor.numel() for anchor in loop.store.anchor(self._context.pieces.segments).values())
        return 8 * elements * (1 + len(self._context.state.kinds)) + (1 << 24)

    def packed(self, loop: LocalUpdateLoop) -> Tensor:
        """All that replicas have in common, in bytes."""
        state, fragments = self._context.state, loop.cadence.fragments
        shared = {name for name, kind in state.kinds.items() if kind in ("replicated", "opaque")}
        tensors = {
            fqn: {name: tensor.cpu() for name, tensor in named.items() if name in shared}
            for fqn, named in state.tensors.items()
        }
        counters = {name: getattr(self._context, name) for name in COUNTERS} | {
            name: value for name, value in loop.numbers().items() if name in loop.counters
        }
        parts = [(f.captured, f.scalar, [reduction.captured for reduction in f.reductions]) for f in fragments]
        rates = [fragment.rates for fragment in fragments]
        position = self.membership.position
        whole = {"tensors": tensors, "counters": counters, "parts": parts, "rates": rates, "position": position}
        buffer = io.BytesIO()
        torch.save(whole, buffer)
        content = buffer.getvalue()
        checked = content + zlib.crc32(content).to_bytes(CHECKSUM, "little")  # torch.load compares none
        return torch.frombuffer(bytearray(checked), dtype=torch.uint8)

    def unpack(self, loop: LocalUpdateLoop, packed: Tensor, position: int | None) -> None:
        """Take it over, all or nothing. Raises `Unfit`. ``position``: where the donor told the store that it stands."""
        content, checksum = (piece.numpy().tobytes() for piece in packed.tensor_split([-CHECKSUM]))
        try:
            if zlib.crc32(content).to_bytes(CHECKSUM, "little") != checksum:
                raise ValueError("it was changed on its way")
            whole = torch.load(io.BytesIO(content), weights_only=True)
            self._require_fitting(loop, whole, position)
        except Exception as error:  # whatever torch says of what is no archive
            reason = str(error).partition("\n")[0]
            raise Unfit(f"it is no state of this run ({reason}); do all replicas run the same version?") from error
        context, store = self._context, loop.store
        device = next(iter(context.pieces.read(copy=False).values()), torch.empty(0)).device
        tensors = cast(Mapping[str, Mapping[str, Tensor]], whole["tensors"])
        context.state.load({fqn: {name: t.to(device) for name, t in named.items()} for fqn, named in tensors.items()})
        store.loaded()
        for name, value in whole["counters"].items():
            owner = context if name in (*COUNTERS, "repairs") else loop.cadence if name == "cycles" else loop
            setattr(owner, name, value)
        each = zip(loop.cadence.fragments, whole["parts"], whole["rates"], strict=True)
        for fragment, (captured, scalar, reductions), rates in each:
            fragment.captured, fragment.scalar, fragment.rates = captured, scalar, tuple(rates)
            fragment.tokens = loop.tokens
            fragment.reductions = [_of_nothing(loop, fragment, captured, device) for captured in reductions]
        self.membership.position = whole["position"]
        context.pieces.write(store.anchor(context.pieces.segments))

    def _require_fitting(self, loop: LocalUpdateLoop, whole: Mapping[str, Any], position: int | None) -> None:
        """Raise ``ValueError`` unless every part of it can be this sync's."""
        anchors, fragments = loop.store.anchor(self._context.pieces.segments), loop.cadence.fragments
        tensors, counters, parts = whole["tensors"], whole["counters"], whole["parts"]
        shapes = {fqn: (named["anchor"].shape, named["anchor"].dtype) for fqn, named in tensors.items()}
        wrong = {
            "position": not _number(whole["position"]) or position not in (None, whole["position"]),
            "counters": {*counters} != {*COUNTERS, *loop.counters} or not all(map(_number, counters.values())),
            "parameters": shapes != {fqn: (anchor.shape, anchor.dtype) for fqn, anchor in anchors.items()},
            "names": not {name for named in tensors.values() for name in named} <= {*self._context.state.kinds},
            "values": not all(is_finite(tensor) for named in tensors.values() for tensor in named.values()),
            "parts": len(parts) != len(fragments)
            or not all(
                _number(captured, NEVER) and math.isfinite(scalar) and all(map(_number, reductions))
                for captured, scalar, reductions in parts
            ),
            "rates": len(whole["rates"]) != len(fragments)
            or not all(
                _number(steps) and all(math.isfinite(rate) and rate >= 0 for rate in (mean, last, before))
                for mean, steps, last, before in whole["rates"]
            ),
        }
        if any(wrong.values()):
            raise ValueError(f"its {' and '.join(name for name, bad in wrong.items() if bad)} cannot be")


def _awaited(loop: LocalUpdateLoop, closing: bool) -> list[Fragment]:
    """The fragments that are to be applied now."""
    return loop.under_way() if closing else loop.cadence.arriving()


def _take_back(loop: LocalUpdateLoop) -> None:
    """What is under way did not arrive; it is kept, to be sent again."""
    for fragment in loop.under_way():
        for reduction in fragment.reductions:
            reduction.branch.rollback()
            reduction.handles = []


def _send_again(loop: LocalUpdateLoop) -> None:
    under_way = [(each.captured, fragment, each) for fragment in loop.under_way() for each in fragment.reductions]
    for _, fragment, reduction in sorted(under_way, key=lambda one: (one[0], one[1].number)):
        reduction.branch = loop.store.branch()
        loop.reduce(fragment, reduction)


def _of_nothing(loop: LocalUpdateLoop, fragment: Fragment, captured: int, device: torch.device) -> Reduction:
    """A newcomer's part in a round that began before it came."""
    nothing = {fqn: torch.zeros_like(anchor) for fqn, anchor in loop.store.anchor(fragment.fqns).items()}
    square = torch.zeros((), device=device)
    return Reduction(captured, loop.store.branch(), [], sent=nothing, weight=0.0, products=[square])


def _number(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < MOST_STEPS


def _copied(own: Tensor | None, source: int, most: int) -> Flow[Tensor]:
    """The bytes of the rank ``source``; the others have None. Raises `Unfit` for more than ``most``."""
    (size,) = yield Broadcast((torch.tensor([own.numel() if own is not None else 0]),), source)
    if own is None and not 0 < int(size) <= most:
        raise Unfit(f"it says that it has {int(size)} bytes, and a state of this model has {most} at most")
    (found,) = yield Broadcast((own if own is not None else torch.empty(int(size), dtype=torch.uint8),), source)
    return found
