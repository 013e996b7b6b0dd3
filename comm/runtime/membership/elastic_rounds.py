"""The rounds of a local update in an elastic run.

A replica keeps its pseudo-gradient until all members have the result. So where one is lost, the others agree on who is
left (`Members`), send the same again, and continue: only the lost replica's pseudo-gradient of this round is gone. A
newcomer copies the replicated state (anchor, outer momentum, counters) from a member that is as far as any, takes part
in the round under way with weight 0, and trains on from the new anchor, with a fresh inner optimizer. A member that
missed the end of a round, since another was lost in that moment, does the same. A slow one may end its round with fewer
steps, and weighs by those that it made.

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
"""Bytes of the CRC-32 at the end of a packed state."""


class ElasticRounds:
    """The `Meeting` of members. The membership's ``position`` counts the meetings of this replica."""

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
        # The exchange that the others wait for, with weight 0.
        if membership.agree_in_replica(self._caught_up(loop)):
            send_again(loop)
        else:
            self._regroup(loop)
        self._wait_for_all(loop, closing=False)
        loop.end_rounds()

    # ---- the Meeting -------------------------------------------------------------------------------------------------

    def require_quiet(self, loop: LocalUpdateLoop) -> None:
        if any(reduction.handles for fragment in loop.under_way() for reduction in fragment.reductions):
            raise RuntimeError(
                f"step {self._context.steps}: a fragment is under way, and members may come or go until it has "
                "arrived; save where sync.quiet is True, as it is after each round that is waited for"
            )

    def wait(self, loop: LocalUpdateLoop, *, closing: bool = False) -> None:
        membership = self.membership
        if awaited(loop, closing):
            called = not closing and membership.members.called(membership.position)
            if not membership.agree_in_replica(not called):
                self._regroup(loop)
            self._wait_for_all(loop, closing=closing)

    def leaves_out(self) -> bool:
        membership = self.membership
        if membership.members.grace == math.inf:
            return False
        late = not membership.agree_in_replica(not membership.members.late(membership.position))
        membership.members.left_out_steps += late
        return late

    # ---- where members wait for each other ---------------------------------------------------------------------------

    def _wait_for_all(self, loop: LocalUpdateLoop, *, closing: bool) -> None:
        while not self.membership.agree_in_replica(self._arrived(loop, closing)):
            self._regroup(loop)
        self.membership.position += 1

    def _arrived(self, loop: LocalUpdateLoop, closing: bool) -> bool:
        """Wait for the awaited messages; False if a peer is lost meanwhile."""
        try:
            for fragment in awaited(loop, closing):
                for handle in fragment.reductions[0].handles:
                    handle.wait()
        except RuntimeError as error:
            if not is_loss(error):
                raise
            self.membership.break_off()
            return False
        return True

    def _regroup(self, loop: LocalUpdateLoop) -> None:
        """Enter the next epoch; members that are behind copy the donor's state; all send again."""
        self.membership.regroup(lambda: self._caught_up(loop))
        send_again(loop)

    def _caught_up(self, loop: LocalUpdateLoop) -> bool:
        """Copy the donor's state to members that are behind; False if one of them was lost."""
        return self.membership.survived(lambda: self._copy_state(loop, self.membership.members.epoch))

    # ---- from the donor to members that are behind -------------------------------------------------------------------

    def _copy_state(self, loop: LocalUpdateLoop, epoch: Epoch | None) -> None:
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
            self.unpack(loop, packed, members.position_of(epoch.donor))

    def _most_bytes(self, loop: LocalUpdateLoop) -> int:
        """A bound of a packed state: fp64 for each element of each name, and 16 MiB."""
        elements = sum(anchor.numel() for anchor in loop.store.anchor(self._context.pieces.segments).values())
        return 8 * elements * (1 + len(self._context.state.kinds)) + (1 << 24)

    def packed(self, loop: LocalUpdateLoop) -> Tensor:
        """The state that all replicas share, as bytes [n]."""
        state, fragments = self._context.state, loop.cadence.fragments
        shared = {name for name, kind in state.kinds.items() if kind in ("replicated", "opaque")}
        tensors = {
            fqn: {name: tensor.cpu() for name, tensor in named.items() if name in shared}
            for fqn, named in state.tensors.items()
        }
        counters = {name: getattr(self._context, name) for name in COUNTERS} | {
            name: value for name, value in loop.numbers().items() if name in loop.counters
        }
        progress = [(f.begun, f.scalar, f.steps, [reduction.captured for reduction in f.reductions]) for f in fragments]
        rates = [fragment.rates for fragment in fragments]
        position = self.membership.position
        state_of_run = {
            "tensors": tensors, "counters": counters, "parts": progress, "rates": rates, "position": position,
            "cycle": loop.cadence.cycle,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state_of_run, buffer)
        content = buffer.getvalue()
        checked = content + zlib.crc32(content).to_bytes(CHECKSUM, "little")  # torch.load verifies none
        return torch.frombuffer(bytearray(checked), dtype=torch.uint8)

    def unpack(self, loop: LocalUpdateLoop, packed: Tensor, position: int | None) -> None:
        """Load a `packed` state; changes nothing if it raises `Unfit`. ``position``: the donor's in the store."""
        content, checksum = (piece.numpy().tobytes() for piece in packed.tensor_split([-CHECKSUM]))
        try:
            if zlib.crc32(content).to_bytes(CHECKSUM, "little") != checksum:
                raise ValueError("it was changed on its way")
            shared = torch.load(io.BytesIO(content), weights_only=True)
            self._require_fitting(loop, shared, position)
        except Exception as error:  # torch raises many kinds for damaged archives
            reason = str(error).partition("\n")[0]
            raise Unfit(f"it is no state of this run ({reason}); do all replicas run the same version?") from error
        context, store = self._context, loop.store
        device = next(iter(context.pieces.read(copy=False).values()), torch.empty(0)).device
        tensors = cast(Mapping[str, Mapping[str, Tensor]], shared["tensors"])
        context.state.load({fqn: {name: t.to(device) for name, t in named.items()} for fqn, named in tensors.items()})
        store.loaded()
        for name, value in shared["counters"].items():
            owner = context if name in (*COUNTERS, "repairs") else loop.cadence if name == "cycles" else loop
            setattr(owner, name, value)
        progress = zip(loop.cadence.fragments, shared["parts"], shared["rates"], strict=True)
        loop.cadence.cycle = tuple(shared["cycle"])
        for fragment, (begun, scalar, steps, reductions), rates in progress:
            fragment.begun, fragment.scalar, fragment.steps, fragment.rates = begun, scalar, steps, tuple(rates)
            fragment.tokens = loop.tokens
            fragment.reductions = [_empty_reduction(loop, fragment, captured, device) for captured in reductions]
        self.membership.position = shared["position"]
        context.pieces.write(store.anchor(context.pieces.segments))

    def _require_fitting(self, loop: LocalUpdateLoop, shared: Mapping[str, Any], position: int | None) -> None:
        """Raise ``ValueError`` unless all entries of ``shared`` can be this sync's."""
        anchors, fragments = loop.store.anchor(self._context.pieces.segments), loop.cadence.fragments
        tensors, counters, progress = shared["tensors"], shared["counters"], shared["parts"]
        shapes = {fqn: (named["anchor"].shape, named["anchor"].dtype) for fqn, named in tensors.items()}
        wrong = {
            "position": not _number(shared["position"]) or position not in (None, shared["position"]),
            "counters": {*counters} != {*COUNTERS, *loop.counters} or not all(map(_number, counters.values())),
            "parameters": shapes != {fqn: (anchor.shape, anchor.dtype) for fqn, anchor in anchors.items()},
            "names": not {name for named in tensors.values() for name in named} <= {*self._context.state.kinds},
            "values": not all(is_finite(tensor) for named in tensors.values() for tensor in named.values()),
            "cycle": len(shared["cycle"]) != 2 or not all(map(_number, shared["cycle"])),
            "parts": len(progress) != len(fragments)
            or not all(
                _number(begun, NEVER) and math.isfinite(scalar) and all(map(_number, (steps, *reductions)))
                for begun, scalar, steps, reductions in progress
            ),
            "rates": len(shared["rates"]) != len(fragments)
            or not all(
                _number(steps) and all(math.isfinite(rate) and rate >= 0 for rate in (mean, last, before))
                for mean, steps, last, before in shared["rates"]
            ),
        }
        if any(wrong.values()):
            raise ValueError(f"its {' and '.join(name for name, bad in wrong.items() if bad)} do not fit")


def awaited(loop: LocalUpdateLoop, closing: bool) -> list[Fragment]:
    """The fragments whose reductions are to be applied now."""
    return loop.under_way() if closing else loop.cadence.arriving()


def _take_back(loop: LocalUpdateLoop) -> None:
    """Roll back reductions that did not arrive, and keep them to be sent again."""
    for fragment in loop.under_way():
        for reduction in fragment.reductions:
            reduction.branch.rollback()
            reduction.handles = []


def send_again(loop: LocalUpdateLoop) -> None:
    """Start all exchanges under way anew, in one order on all members."""
    under_way = [(fragment, reduction) for fragment in loop.under_way() for reduction in fragment.reductions]
    for fragment, reduction in sorted(under_way, key=lambda pair: (pair[1].captured, pair[0].number)):
        reduction.branch = loop.store.branch()
        loop.reduce(fragment, reduction)


def _empty_reduction(loop: LocalUpdateLoop, fragment: Fragment, captured: int, device: torch.device) -> Reduction:
    """A newcomer's reduction in a round that began before it joined: zeros, with weight 0."""
    zeros = {fqn: torch.zeros_like(anchor) for fqn, anchor in loop.store.anchor(fragment.fqns).items()}
    square = torch.zeros((), device=device)
    return Reduction(captured, loop.store.branch(), [], sent=zeros, weight=0.0, products=[square])


def _number(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < MOST_STEPS


def _copied(packed: Tensor | None, source: int, most: int) -> Flow[Tensor]:
    """``packed`` of the rank ``source``; the others have None. Raises `Unfit` for more than ``most`` bytes."""
    (size,) = yield Broadcast((torch.tensor([packed.numel() if packed is not None else 0]),), source)
    if packed is None and not 0 < int(size) <= most:
        raise Unfit(f"it says that it has {int(size)} bytes, and a state of this model has {most} at most")
    buffer = packed if packed is not None else torch.empty(int(size), dtype=torch.uint8)
    (received,) = yield Broadcast((buffer,), source)
    return received
