"""`attach`: put a method to work on a model, of any engine or of none.

The model may be in DDP, sharded by FSDP2, in a DeepSpeed engine, or, for local updates, a plain module. Each has an
adapter in `adapters`; methods use `dtrain.comm.pieces.Pieces` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.adapters.adapter import Adapter, pieces_of, steppers_of
from dtrain.comm.adapters.communicating_optimizers import Listening, require_silent
from dtrain.comm.adapters.fsdp_mesh import replicate_group_of, reshard
from dtrain.comm.adapters.grid import own_groups
from dtrain.comm.adapters.rank_files import RankFiles
from dtrain.comm.adapters.requirements import is_plain, require_call, require_servable
from dtrain.comm.adapters.untrained_tensors import equalized
from dtrain.comm.adapters.wrappers import unwrapped_model, unwrapped_optimizer
from dtrain.comm.channel import Channel
from dtrain.comm.inner_optimizers.chained import with_members
from dtrain.comm.pieces import Pieces
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.comm.transports.transport import SelfTransport

if TYPE_CHECKING:
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.membership.members import Members
    from dtrain.comm.runtime.method import Sync


_MISSING = cast("Sync", None)  # so that a call without it gets a helpful error


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    sync: Sync = _MISSING,
    *,
    replicate_group: dist.ProcessGroup | None = None,
    seed: int = 0,
    members: Members | None = None,
    forward_steps: bool = False,
) -> Attached:
    """Attach ``sync`` to ``model``: it does all communication between replicas. Call on every rank that trains, before
    the first backward.

    Call ``attached.step()`` where ``optimizer.step()`` and ``zero_grad()`` were called, or attach with
    ``forward_steps=True``; gradient clipping stays between ``backward`` and ``step``. Attaching copies the parameters
    of replica 0, trained and frozen, and its buffers to all replicas.

    Args:
        model: ``DistributedDataParallel``; an FSDP2 root (``fully_shard`` on a mesh of a replicate and a shard axis, or
            of the shard axis alone); or a DeepSpeed engine of ZeRO stage 1, 2 or 3 whose ``mpu`` names the shard group.
            For a local update, such as `diloco`, also a plain module, each rank a replica.
        optimizer: the inner optimizer, or several, each of its own parameters: a list, or an optimizer that contains
            them in ``optimizers``, as torchtitan's does; None for a DeepSpeed engine, which has its own.
        sync: made by `every_step`, `diloco`, ...
        replicate_group: the peers of this rank: those that hold the same shard. For DDP: its process group, by default;
            for a plain module: all ranks; for FSDP2 on a mesh with a replicate axis: that axis. With the shard axis
            alone, and with DeepSpeed, it must be given. Ranks that do not train, such as evaluators, do not call
            `attach`.
        seed: of all random draws (stochastic rounding, random-k, SPARTA's coordinates); the same on all ranks.
        members: for an elastic run: ``Members("host:port", replicas=4)``, in place of ``replicate_group``. The
            default process group is then this replica's own; the sync is a local update.
        forward_steps: ``optimizer.step()``, with or without a closure, is ``attached.step()`` until ``detach()``, for
            trainers that call it themselves; of several optimizers, the last one's that is stepped. With a
            DeepSpeed engine: ``engine.step()`` at the last microbatch. ``attached.skipped_in_a_row`` is 0 after it
            unless the step was skipped.

    Raises ``TypeError`` for another kind of model, for a sync that a plain module cannot serve, and for complex
    parameters; ``ValueError`` for a group that is missing or does not contain this rank, an optimizer of another model,
    embeddings with sparse gradients, and ranks with different ``sync`` or models; and what adapters raise for
    configurations that they do not support.
    """
    require_call(optimizer, sync)
    model, inner = unwrapped_model(model), unwrapped_optimizer(optimizer)
    plain = is_plain(model)
    if isinstance(model, FSDPModule):
        reshard(model)  # a look at the model before has swapped its parameters
    require_servable(model, inner)  # before groups are made
    if members is not None:
        attached = _attached_to_members(model, inner, sync, members, seed)
    else:
        attached = _attached_to_peers(model, inner, sync, _peers(model, replicate_group, plain=plain), seed)
    if forward_steps:
        cast(Adapter, attached.pieces).guard.forward(steppers_of(model, optimizer, inner), attached.step)
        attached.forwards_steps = True
    return attached


def _peers(model: nn.Module, given: dist.ProcessGroup | None, *, plain: bool) -> dist.ProcessGroup:
    """The ranks with the same shard as this one."""
    group = given
    if isinstance(model, FSDPModule):
        group = replicate_group_of(model, given)
    if group is None and isinstance(model, DistributedDataParallel):
        group = model.process_group
    if group is None and plain:
        group = dist.group.WORLD
    if group is None:
        raise ValueError(
            f"{type(model).__name__} shards the model, so dtrain cannot know which ranks hold the same shard; pass "
            'replicate_group, for example mesh.get_group("replicate")'
        )
    if group.rank() < 0:
        raise ValueError("this rank is not in replicate_group; build the groups on every rank and pass its own")
    return group


def _attached_to_peers(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, sync: Sync, peers: dist.ProcessGroup, seed: int
) -> Attached:
    channel = Channel(own_groups(model, peers))

    def bind(pieces: Pieces) -> Attached:
        attached = sync.bind(pieces, seed)
        channel.run(equalized(model, pieces.place), "agreement")
        return attached

    return _bound(model, optimizer, channel, bind)


def _attached_to_members(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, sync: Sync, members: Members, seed: int
) -> Attached:
    def bind(pieces: Pieces) -> Attached:
        return sync.bind_members(pieces, seed, members)

    if isinstance(members, type) or not hasattr(members, "transport"):
        raise TypeError(f'members is {members!r}; give Members("host:port", replicas=...)')
    world = list(range(dist.get_world_size()))
    shard = TorchTransport.between(world) if len(world) > 1 else SelfTransport()
    channel = Channel({"replicate": members.transport(), "shard": shard})
    return _bound(model, optimizer, channel, bind)


def _bound(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, channel: Channel, bind: Callable[[Pieces], Attached]
) -> Attached:
    """A refusal leaves the model and the optimizer unchanged, and no group open."""
    pieces: Adapter | None = None
    try:
        pieces = pieces_of(model, optimizer, channel, overlap=False)
        attached = bind(pieces)
        pieces.trained.differ = attached.parameters_kind == "per_worker"
        if pieces.trained.differ:
            for optimizer in with_members(pieces.optimizer):
                require_silent(optimizer)
            pieces.trained.listening = Listening(pieces.optimizer, _replica(pieces.channel))
            pieces.trained.watch_outside()
            attached.context.stepped_elsewhere = frozenset(pieces.trained.outside)
            attached.context.require_still = pieces.trained.require_still
        pieces.trained.warn_of_outside()
        attached.files = RankFiles(attached, pieces, attached.saved)
        return attached
    except BaseException:
        if pieces is not None:
            pieces.detach()
        channel.close(timeout_seconds=2.0)
        raise


def _replica(channel: Channel) -> list[int]:
    """The ranks of this replica."""
    group = getattr(channel.transports["shard"], "group", None)
    return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
