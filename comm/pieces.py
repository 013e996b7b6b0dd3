"""The seam between a method and whatever holds the model: named local fp32 pieces of one rank.

`comm/adapters` adapts each engine, and anybody's own DDP or FSDP2 model, to this Protocol. Methods know nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named, Segment
from dtrain.comm.ops import Flow, Place


class Exchange(Protocol):
    """What an engine calls for each group of gradients that the backward pass has finished."""

    def __call__(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        """Flow from this rank's flat fp32 gradient pieces to the combined ones.

        ``present``: False for zeros in place of gradients that this rank does not have, True for others, where the
        engine wants to know whether any replica has them; all peers alike.
        """


@runtime_checkable
class Repeated(Exchange, Protocol):
    """An exchange that a step may have several times for one parameter, one for each backward pass."""

    @property
    def adds(self) -> bool:
        """True: it takes the gradient of each backward pass alone, and its results are summed. False: an engine that
        accumulates gradients itself may give it the sum so far, and its result replaces that.
        """

    def stood_in(self) -> None:
        """This rank, whose data have ended, has given zeros in place of a backward pass (``model.join()``)."""


@runtime_checkable
class Private(Exchange, Protocol):
    """An exchange that may send nothing."""

    @property
    def private(self) -> bool:
        """Whether it sends nothing, so that a plain module, which has nobody to send to, can serve it, too."""


class Pieces(Protocol):
    """One rank's parameters, as flat fp32 pieces by FQN; empty pieces are left out.

    ``segments``: what this rank owns; all ranks of a replica together own each element once.
    ``held``: what `restore` must be given, at least ``segments``; everything on DDP.
    """

    channel: Channel
    optimizer: torch.optim.Optimizer
    """The inner one, to be read; only `step` steps it."""

    @property
    def segments(self) -> Mapping[str, Segment]: ...

    @property
    def held(self) -> Mapping[str, Segment]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The unsharded shape of each trained parameter, empty pieces included."""

    @property
    def place(self) -> Place:
        """This rank on the replicate axis."""

    def read(self, fqns: Collection[str] | None = None, *, copy: bool = True) -> dict[str, Tensor]:
        """The current values of ``segments``, fp32: those that the inner optimizer steps from.

        ``fqns``: of these parameters only. Without ``copy`` they may be the engine's own memory, to be used before the
        next step and never written to.
        """

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        """Overwrite ``segments`` so that the next forward pass sees the values and the next step starts from them.

        ``fqns``: of these parameters only, the same on all ranks of a replica, whatever pieces of them each holds.
        """

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        """From now on ``exchange`` combines the gradients; None: they stay inside the replica. Called once."""

    def finish(self) -> None:
        """Block until the gradients of this step have been exchanged. Before clipping."""

    def gradients_finite(self) -> bool:
        """Whether this rank's gradients hold no NaN and no infinity. After `finish`."""

    def unused(self) -> set[str]:
        """Parameters that no rank has a gradient for, so that the optimizer leaves them as they are. After `finish`."""

    def step(self) -> None:
        """The inner optimizer's step, then empty gradients."""

    def skip(self) -> None:
        """No step; empty gradients."""

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The inner optimizer's state by name and FQN: flat pieces of ``segments``, or 0-dim tensors (step counts)."""

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        """Set parameters and the inner optimizer's state from pieces that cover ``held``."""

    def detach(self) -> None:
        """Leave the model as it was found."""
