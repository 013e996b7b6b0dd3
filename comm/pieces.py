"""The seam between a method and an engine: named local fp32 pieces of the model on one rank.

`comm/adapters` adapts each engine, and a user's own DDP or FSDP2 model, to this Protocol. Methods use nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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

        ``present``: set if the engine needs to know whether any replica has these gradients, on all peers or on none:
        False for zeros in place of gradients that this rank lacks, True otherwise.
        """


@runtime_checkable
class Repeated(Exchange, Protocol):
    """An exchange that may run several times in a step for one parameter, once for each backward pass."""

    @property
    def adds(self) -> bool:
        """True: its input is the gradient of one backward pass, and its results are summed. False: an engine that
        accumulates gradients may pass the sum so far, and the result replaces that.
        """

    def stood_in(self) -> None:
        """Called when this rank, out of data, has sent zeros in place of a backward pass (``model.join()``)."""


def nothing() -> None:
    """What `EachPass` does where ranks cannot run out of data: replicas of a local update make as many steps."""


@dataclass(frozen=True)
class EachPass:
    """A `Repeated` exchange, of functions of the method: ``exchanging`` for each group of each backward pass."""

    exchanging: Exchange
    adds: bool
    stood_in: Callable[[], None] = nothing

    def __call__(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        return self.exchanging(gradients, present)


@runtime_checkable
class Private(Exchange, Protocol):
    """An exchange that may send nothing."""

    @property
    def private(self) -> bool:
        """Whether it sends nothing, so that a plain module, which has no peers, can serve it, too."""


class Pieces(Protocol):
    """One rank's parameters, as flat fp32 pieces by FQN; empty pieces are left out.

    ``segments``: what this rank owns; all ranks of a replica together own each element once.
    ``held``: what `restore` must be given, at least ``segments``; everything on DDP.
    """

    channel: Channel
    optimizer: torch.optim.Optimizer
    """The inner optimizer, read-only; only `step` steps it."""

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

        ``fqns``: of these parameters only. Without ``copy`` they may be the engine's own memory: valid until the next
        step, and read-only.
        """

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        """Overwrite ``segments`` so that the next forward pass sees the values and the next step starts from them.

        ``fqns``: of these parameters only; the same on all ranks of a replica, even those that hold no piece of them.
        """

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        """Let ``exchange`` combine the gradients; None: they stay within the replica. Called once."""

    def finish(self) -> None:
        """Block until the gradients of this step have been exchanged. Called before clipping."""

    def gradients_finite(self) -> bool:
        """Whether this rank's gradients hold no NaN and no infinity. Called after `finish`."""

    def unused(self) -> set[str]:
        """Parameters without a gradient on any rank, which the optimizer does not step. Called after `finish`."""

    def step(self) -> None:
        """Step the inner optimizer, then clear the gradients."""

    def skip(self) -> None:
        """Clear the gradients without a step."""

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The inner optimizer's state by name and FQN: flat pieces of ``segments``, or 0-dim tensors (step counts)."""

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        """Set parameters and the inner optimizer's state from pieces that cover ``held``."""

    def detach(self) -> None:
        """Restore the model as it was before `attach`."""
