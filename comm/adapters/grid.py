"""Which ranks are one replica, which are its peers, and groups between them that nobody else uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.ops import Axis
from dtrain.comm.transports.json_gather import told_by_all
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.comm.transports.transport import SelfTransport


def own_groups(model: nn.Module, replicate_group: dist.ProcessGroup) -> dict[Axis, TorchTransport | SelfTransport]:
    """Groups that nobody else uses: the peers', and this replica's. Nobody but these ranks needs to call it."""
    peers = sorted(dist.get_process_group_ranks(replicate_group))
    here = _replica_of(model, peers)
    both = sorted(set(here) & set(peers) - {dist.get_rank()})
    if both:
        raise ValueError(
            f"replicate_group {peers} holds ranks {both} of this rank's own shard group {here}; give the ranks that "
            'hold the same shard of other replicas: mesh.get_group("replicate")'
        )
    groups: dict[Axis, TorchTransport | SelfTransport] = {
        "replicate": TorchTransport.between(peers),
        "shard": TorchTransport.between(here) if len(here) > 1 else SelfTransport(),
    }
    placed: dict[int, tuple[list[int], list[int]]] = {}
    for transport in groups.values():
        if isinstance(transport, TorchTransport):
            told = told_by_all([dist.get_rank(), here, peers], transport.group)
            placed |= {rank: (theirs, across) for rank, theirs, across in told}  # type: ignore[misc]
    try:
        _require_a_grid(here, peers, placed)
    except ValueError:
        for transport in groups.values():
            transport.close()
        raise
    return groups


def _replica_of(model: nn.Module, peers: list[int]) -> list[int]:
    """The ranks that together are one replica, this one among them."""
    rank = dist.get_rank()
    if isinstance(model, FSDPModule):
        cut = next((p for p in model.parameters() if isinstance(p, DTensor)), None)  # the adapter refuses without
        alone = cut is None or cut.device_mesh.ndim != 1
        return [rank] if cut is None or alone else sorted(dist.get_process_group_ranks(cut.device_mesh.get_group()))
    if hasattr(model, "zero_optimization_stage"):
        return sorted(dist.get_process_group_ranks(cast(Any, model).data_parallel_group))
    if not isinstance(model, DistributedDataParallel):
        if len(peers) == 1 < dist.get_world_size():
            raise TypeError(
                f"{type(model).__name__} is a plain module, of which each rank is a replica, and replicate_group holds "
                f"rank {rank} alone of {dist.get_world_size()}; give the group of all that train, or wrap the module "
                "in DistributedDataParallel or fully_shard if several ranks are one replica"
            )
        return [rank]
    spanned = dist.get_process_group_ranks(model.process_group)
    if not set(peers) <= set(spanned):
        return sorted(spanned)  # DDP inside a replica
    columns = sorted({tuple(sorted(ranks)) for ranks in told_by_all(peers, model.process_group)})
    held = sorted(other for column in columns for other in column)
    if held != sorted(spanned) or len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"this DistributedDataParallel is over ranks {sorted(spanned)}, which the replicate groups "
            f"{[list(column) for column in columns]} do not cut into equal parts; give every rank of it one of groups "
            "of one size, each rank once"
        )
    place = peers.index(rank)
    return [column[place] for column in columns]


def _require_a_grid(here: list[int], peers: list[int], placed: Mapping[int, tuple[list[int], list[int]]]) -> None:
    """Raise ``ValueError`` unless replicas are of one size, and their ranks have the same places among their peers."""
    rank = dist.get_rank()
    for other, (theirs, across) in sorted(placed.items()):
        if len(theirs) != len(here) or len(across) != len(peers):
            raise ValueError(
                f"rank {other} has the replica {theirs} and the peers {across}, rank {rank} the replica {here} and the "
                f"peers {peers}; replicas must be of one size, and each rank have a peer in every other replica"
            )
        if other in here and across.index(other) != peers.index(rank):
            raise ValueError(
                f"ranks {rank} and {other} are of one replica {here}, but have different places among their peers "
                f"{peers} and {across}; build the groups from one mesh"
            )
