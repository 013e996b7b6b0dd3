"""The adapter of a model, whichever engine it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.adapters.optimizer import StepGuard
from dtrain.comm.adapters.rank_files import Held
from dtrain.comm.adapters.requirements import is_plain, require_servable
from dtrain.comm.adapters.wrappers import several_in
from dtrain.comm.channel import Channel
from dtrain.comm.inner_optimizers.chained import with_members


class Adapter(Held, Protocol):
    """Pieces of a model, and the guard of its optimizer."""

    guard: StepGuard


def pieces_of(model: nn.Module, optimizer: torch.optim.Optimizer | None, channel: Channel, *, overlap: bool) -> Adapter:
    """The adapter for ``model``; see `attach`. ``overlap``: the caller waits (`Pieces.finish`) before it clips."""
    plain = is_plain(model)
    require_servable(model, optimizer)
    if hasattr(model, "zero_optimization_stage"):
        from dtrain.comm.adapters.zero import zero_pieces

        return zero_pieces(model, channel)
    if optimizer is None:
        raise ValueError(f"{type(model).__name__} needs its optimizer here; None is for DeepSpeed engines")
    if isinstance(model, DistributedDataParallel):
        from dtrain.comm.adapters.ddp import DDPPieces

        return DDPPieces(model, optimizer, channel)
    if plain:
        from dtrain.comm.adapters.module import ModulePieces

        if channel.places["shard"].size > 1:
            raise TypeError(
                f"{type(model).__name__} is a plain module, of which each rank is a replica, and here "
                f"{channel.places['shard'].size} ranks are one; wrap it in DistributedDataParallel or fully_shard"
            )
        return ModulePieces(model, optimizer, channel)
    from dtrain.comm.adapters.fsdp import FSDPPieces

    return FSDPPieces(model, optimizer, channel, overlap=overlap)


def steppers_of(model: nn.Module, given: object, optimizer: torch.optim.Optimizer | None) -> Sequence[object]:
    """What a trainer steps: each of several optimizers that it was ``given`` one by one, or its DeepSpeed engine."""
    if hasattr(model, "zero_optimization_stage"):
        return [model]
    assert optimizer is not None  # `pieces_of` has refused that
    members = with_members(optimizer)[1:]
    return members if members and several_in(given) is not None else [optimizer]
