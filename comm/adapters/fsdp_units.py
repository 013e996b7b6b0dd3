"""The units of an FSDP2 model, and the order in which replicas exchange their gradients.

FSDP2 calls the hook of one unit after the other, and only of units that ran. Which ones those are may differ between
replicas: experts, a vision tower. So exchanges are paired by an order that all replicas have agreed on. A gradient that
is ready before its turn waits; one that never comes is sent as zeros, at the end of the backward pass. Where no
replica has run a unit its gradient stays None, as it would without replicas.

The order is that of replica 0's first step; in that step it is the modules' order, reversed. Where all replicas run
the same units in the same order, nothing ever waits. A unit that no replica ran in some pass is doubtful from then on:
at the end of each pass the replicas gather whether they ran it, one byte each, before it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.comm.adapters.wrappers import named_parameters
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named, Segment, working
from dtrain.comm.ops import AllGather, Broadcast, Flow
from dtrain.comm.pieces import Exchange
from dtrain.comm.torch_private import (
    ParameterGroup,
    ShardedParameter,
    at_end_of_backward,
    backward_id,
    outer_backward_goes_on,
    parameter_groups,
    without_zeros_of_unused,
)

if TYPE_CHECKING:
    from dtrain.comm.channel import Channel, Handle

NOTHING: Named = MappingProxyType({})


class Unit:
    """One of FSDP2's parameter groups, and where its flat gradient holds each parameter."""

    def __init__(self, group: ParameterGroup, names: Mapping[int, str], segments: Mapping[str, Segment]) -> None:
        self.group, self.names, self.segments = group, names, segments

    def cut(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of the pieces in FSDP2's flat gradient, by FQN. Raises ``RuntimeError`` if parameters are missing."""
        pieces, start = {}, 0
        for param in self._trained():
            fqn = self.names[id(param.parameter)]
            if fqn in self.segments:
                pieces[fqn] = flat[start : start + self.segments[fqn].numel]
            start += param.padded_numel
        if start != flat.numel():
            raise RuntimeError(
                f"an FSDP2 unit handed over {flat.numel()} gradient elements for parameters of {start}; were some "
                f"unused in this step? {without_zeros_of_unused()}"
            )
        return pieces

    def unsynced(self) -> bool:
        """Whether it holds a gradient that no pass has reduced yet."""
        return any(param.unreduced for param in self._trained())

    def zeros(self) -> dict[str, Tensor]:
        """The gradients that a replica sends for a unit that it did not run."""
        zeros, dtype, device = {}, self.group.reduce_dtype, self.group.device
        for param in self._trained():
            fqn = self.names[id(param.parameter)]
            if fqn in self.segments:
                zeros[fqn] = working(torch.zeros(self.segments[fqn].numel, dtype=dtype, device=device))
        return zeros

    def shows(self, flat: Tensor) -> bool:
        """Whether ``p.grad`` will be a view of ``flat``, which may be filled later: FSDP2 makes no copy."""
        if self.group.divisor_after_hook is not None:
            return False
        parameters = [param.parameter for param in self._trained()]
        return all(p.dtype == flat.dtype and p.grad is None and p.device == flat.device for p in parameters)

    def require_shown(self, filled: Named) -> None:
        """Raise ``RuntimeError`` unless the gradients are views of the buffers that were filled after the hook."""
        for param in self._trained():
            fqn = self.names[id(param.parameter)]
            gradient, piece = param.parameter.grad, filled.get(fqn)
            if gradient is None or piece is None or _address(_local(gradient)) == _address(piece):
                continue
            raise RuntimeError(
                f"the gradient of {fqn} is a copy that was made before the exchange had "
                "filled it; clear gradients with set_to_none=True and call set_requires_gradient_sync(False) on all "
                "but the last microbatch, or attach with overlap=False"
            )

    def add(self, values: Named) -> None:
        """Add combined gradients to what the parameters have; those that have none, on any shard, get them."""
        divisor = self.group.divisor_after_hook
        for param in self._trained():
            parameter, fqn = param.parameter, self.names[id(param.parameter)]
            local = parameter.to_local()
            if local.numel() and fqn not in values:
                continue  # it became trainable after attach
            piece = values.get(fqn, local).to(device=local.device)
            if divisor is not None:
                piece = piece / divisor
            piece = piece.to(local.dtype).view(local.shape)
            if parameter.grad is None:
                parameter.grad = param.sharded(piece.clone())
            elif local.numel():  # of an empty unit on this rank FSDP2 itself has set an empty gradient
                with torch.no_grad():
                    _local(parameter.grad).add_(piece)

    def _trained(self) -> list[ShardedParameter]:
        return [param for param in self.group.parameters if param.parameter.requires_grad]


def units_of(model: nn.Module, segments: Mapping[str, Segment]) -> list[Unit]:
    """All units with trainable parameters, in one order on all ranks. A module may have several, each on its mesh."""
    names = {id(parameter): fqn for fqn, parameter in named_parameters(model)}
    groups = (group for _, group in parameter_groups(model))
    return [
        Unit(group, names, segments)
        for group in groups
        if any(param.parameter.requires_grad for param in group.parameters)
    ]


class Passes:
    """The exchanges of successive backward passes.

    ``overlap``: they overlap with backward until `finish`; otherwise a unit whose turn it is waits in its hook, and the
    others at the end of the pass.
    """

    def __init__(
        self, root: FSDPModule, units: list[Unit], exchange: Exchange, channel: Channel, overlap: bool
    ) -> None:
        self.root, self.units, self.exchange, self.channel, self.overlap = root, units, exchange, channel, overlap
        self.order = list(reversed(range(len(units))))
        self.agreed = False
        self.doubtful: set[int] = set()  # units that no replica ran in some pass
        self._open = False  # whether a gradient has come in this pass
        self._arrivals: list[int] = []  # in this step
        self._parked: dict[int, dict[str, Tensor]] = {}
        self._sent: list[int] = []  # in this part of the pass, in which each unit is sent once
        self._under_way: list[_Sent] = []
        self._present: dict[int, bool] = {}  # whether any replica ran it, in this pass
        self.with_gradient: set[str] = set()  # parameters that got a gradient in this step
        self._local = False  # whether nothing is sent at present, as after a warm-up
        self._exchanged = False  # in this step
        self._closed = 0  # passes of this step
        self._watched = -1
        for number, unit in enumerate(units):
            unit.group.set_hook(partial(self._arrived, number))

    def finish(self) -> None:
        """Block until every gradient of this step is the combined one. All replicas must call it.

        Raises ``RuntimeError`` if a copy was made of a gradient that the exchange was to fill.
        """
        if self._open or not self._closed:
            self._close()
        self._wait()
        self._update_doubtful()
        if self._exchanged and any(unit.unsynced() for unit in self.units):
            raise RuntimeError(
                "the last backward pass of this step ran with set_requires_gradient_sync(False), so its gradient waits "
                "for another step; call set_requires_gradient_sync(True) before the last microbatch of a step"
            )
        if self._exchanged and not self.agreed:
            seen = list(dict.fromkeys(reversed(self._arrivals)))[::-1]  # each at its last occurrence
            self.order, self.agreed = self.channel.run(_first_order(_merged(seen, self.order)), "set-up"), True

    def step_ended(self) -> None:
        """Further gradients belong to the next step."""
        self._closed, self._arrivals, self._exchanged, self.with_gradient = 0, [], False, set()

    def detach(self) -> None:
        for unit in self.units:
            unit.group.set_hook(None)

    def _arrived(self, number: int, flat: Tensor) -> None:
        """The hook of a unit: ``flat`` is this replica's gradient, to be replaced by the combined one."""
        if self._closed and not self._open:
            self._wait()  # FSDP2 is about to add to results that have not arrived
            self._update_doubtful()
        self._watch()
        self._open = True
        self._arrivals.append(number)
        if number in self._sent:  # again in one pass, as within reentrant checkpoints
            self._send_the_rest()
            self._wait()
        pieces = self.units[number].cut(flat)
        gradients = {fqn: working(piece) for fqn, piece in pieces.items()}
        earlier = self._parked.pop(number, None)
        if earlier is not None:
            gradients = {fqn: earlier[fqn] + piece for fqn, piece in gradients.items()}
        if number == self._turn():
            if not self.overlap:
                self._start(number, gradients, into=pieces).wait()
            elif self.units[number].shows(flat):
                self._start(number, gradients, into=pieces)
            else:
                self._start(number, _moved_out(gradients, pieces))
            self._send_parked()
        else:
            self._parked[number] = _moved_out(gradients, pieces)

    def _turn(self) -> int | None:
        """The unit whose turn it is."""
        return next((number for number in self.order if number not in self._sent and number not in self.doubtful), None)

    def _send_parked(self) -> None:
        """Send the parked gradients whose turn has come."""
        while (number := self._turn()) in self._parked:
            self._start(number, self._parked.pop(number))

    def _start(self, number: int, gradients: Named | None, into: Named = NOTHING) -> Handle[Combined]:
        """Send ``gradients``, or zeros for None. The combined ones are copied ``into`` the given tensors."""
        sent = self.units[number].zeros() if gradients is None else gradients
        handle = self.channel.start(_combined(self.exchange, sent, gradients is not None, into), "gradients")
        if not self.overlap:
            self.channel.flush()  # at the same places on all replicas, whichever of them waits in a hook
        self._sent.append(number)
        self._under_way.append(_Sent(number, handle, gradients, into))
        return handle

    def _send_the_rest(self) -> None:
        """Send all units not yet sent in this part of the pass."""
        while (number := self._turn()) is not None:
            self._start(number, self._parked.pop(number, None))
        self._sent = []

    def _close(self) -> None:
        """End the pass."""
        self._send_the_rest()
        if self.doubtful:
            self._wait()
            for number in self._wanted():
                self._start(number, self._parked.pop(number, None))
        self._sent, self._open, self._closed = [], False, self._closed + 1
        if not self.overlap:
            self._wait()
            self._update_doubtful()

    def _wanted(self) -> list[int]:
        """The doubtful units that some replica has run in this pass."""
        doubtful = [number for number in self.order if number in self.doubtful]
        if self._local:
            return [number for number in doubtful if number in self._parked]
        run_here = torch.tensor([number in self._parked for number in doubtful], dtype=torch.uint8, device=self._device)
        run_anywhere = self.channel.run(_anywhere(run_here), "units")
        return [number for number, run in zip(doubtful, run_anywhere, strict=True) if run]

    def _wait(self) -> None:
        for sent in self._under_way:
            combined, unit = sent.handle.wait(), self.units[sent.number]
            self._local = combined.present is None
            if not self._local:
                self._present[sent.number] = bool(combined.present) or self._present.get(sent.number, False)
            if combined.present or (self._local and sent.gradients is not None):
                self.with_gradient.update(combined.values)
            if sent.into and self.overlap:
                unit.require_shown(sent.into)
            elif not sent.into and (combined.present or (self._local and sent.gradients is not None)):
                unit.add(combined.values)
        self._under_way = []

    def _update_doubtful(self) -> None:
        """Units that no replica ran in a pass are doubtful from then on. All replicas see the same."""
        if any(self._present.values()):  # otherwise no unit ran, which is refused elsewhere
            self.doubtful |= {number for number, present in self._present.items() if not present}
            self._exchanged = True
        self._present = {}

    def _watch(self) -> None:
        """Have `_backward_ended` called at the end of this backward pass."""
        number = backward_id()
        if number not in (-1, self._watched):
            self._watched = number
            at_end_of_backward(self._backward_ended)

    def _backward_ended(self) -> None:
        self._watched = -1
        # Within a reentrant checkpoint only a block's backward ends; FSDP2's own callback comes before this one.
        if self._open and not outer_backward_goes_on(self.root):
            self._close()

    @property
    def _device(self) -> torch.device:
        return self.units[0].group.device


@dataclass(frozen=True)
class _Sent:
    """A unit's exchange under way. It keeps alive what another stream reads and writes until it has ended."""

    number: int
    handle: Handle[Combined]
    gradients: Named | None
    into: Named


def _local(gradient: Tensor) -> Tensor:
    assert isinstance(gradient, DTensor)  # of a sharded parameter
    return gradient.to_local()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _moved_out(gradients: Named, pieces: Named) -> dict[str, Tensor]:
    """Copies of ``gradients``; FSDP2 gets -0.0 in ``pieces``, until the combined gradient is added.

    x + -0.0 is x for every x, bitwise.
    """
    copies = {fqn: gradient.clone() for fqn, gradient in gradients.items()}
    for piece in pieces.values():
        piece.fill_(-0.0)
    return copies


def _merged(seen: list[int], order: list[int]) -> list[int]:
    """``seen``, with the rest of ``order`` inserted, each after its predecessor there.

    >>> _merged([2, 0], [3, 2, 1, 0])
    [3, 2, 1, 0]
    >>> _merged([0, 2], [3, 2, 1, 0])
    [3, 0, 2, 1]
    """
    merged = list(seen)
    for index, number in enumerate(order):
        if number not in merged:
            merged.insert(merged.index(order[index - 1]) + 1 if index else 0, number)
    return merged


def _combined(exchange: Exchange, gradients: Named, present: bool, into: Named) -> Flow[Combined]:
    combined = yield from exchange(gradients, present)
    for fqn, piece in into.items():
        piece.copy_(combined.values[fqn])
    return combined


def _first_order(order: list[int]) -> Flow[list[int]]:
    """Replica 0's ``order``."""
    (numbers,) = yield Broadcast((torch.tensor(order, dtype=torch.int32),), source=0)
    return [int(number) for number in numbers.tolist()]


def _anywhere(run_here: Tensor) -> Flow[list[bool]]:
    (rows,) = yield AllGather((run_here,))
    return [bool(run) for run in rows.any(0).tolist()]
