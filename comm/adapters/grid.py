"""Which ranks are one replica, which are this rank's peers, and new process groups for both axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.adapters.fsdp_mesh import shard_ranks
from dtrain.comm.ops import Axis
from dtrain.comm.transports.json_gather import gather_json
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.comm.transports.transport import SelfTransport


def own_groups(model: nn.Module, replicate_group: dist.ProcessGroup) -> dict[Axis, TorchTransport | SelfTransport]:
    """A new process group for each axis: the peers', and this replica's. Called by the ranks of both, and no others."""
    peers = sorted(dist.get_process_group_ranks(replicate_group))
    replica = _replica_of(model, peers)
    both = sorted(set(replica) & set(peers) - {dist.get_rank()})
    if both:
        raise ValueError(
            f"replicate_group {peers} holds ranks {both} of this rank's own shard group {replica}; give the ranks that "
            'hold the same shard of other replicas: mesh.get_group("replicate")'
        )
    across = TorchTransport.between(peers)
    within = TorchTransport.between(replica) if len(replica) > 1 else None
    transports = [across] if within is None else [across, within]
    positions: dict[int, tuple[list[int], list[int]]] = {}
    for transport in transports:
        for rank, its_replica, its_peers in gather_json([dist.get_rank(), replica, peers], transport.group):
            positions[cast(int, rank)] = (cast(list[int], its_replica), cast(list[int], its_peers))
    try:
        _require_a_grid(replica, peers, positions)
    except ValueError:
        for transport in transports:
            transport.close()
        raise
    return {"replicate": across, "shard": within or SelfTransport()}


def _replica_of(model: nn.Module, peers: list[int]) -> list[int]:
    """The ranks that together are one replica, this one among them."""
    rank = dist.get_rank()
    if isinstance(model, FSDPModule):
        return shard_ranks(model) or [rank]  # without a sharded parameter the adapter raises
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
    columns = sorted({tuple(sorted(ranks)) for ranks in gather_json(peers, model.process_group)})
    covered = sorted(member for column in columns for member in column)
    if covered != sorted(spanned) or len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"this DistributedDataParallel is over ranks {sorted(spanned)}, which the replicate groups "
            f"{[list(column) for column in columns]} do not cut into equal parts; give every rank of it one of groups "
            "of one size, each rank once"
        )
    place = peers.index(rank)
    return [column[place] for column in columns]


def _require_a_grid(replica: list[int], peers: list[int], positions: Mapping[int, tuple[list[int], list[int]]]) -> None:
    """Raise ``ValueError`` unless replicas have one size, and their ranks the same positions among their peers.

    ``positions``: the replica and the peers of each rank, as gathered.
    """
    rank = dist.get_rank()
    for other_rank, (its_replica, its_peers) in sorted(positions.items()):
        if len(its_replica) != len(replica) or len(its_peers) != len(peers):
            raise ValueError(
                f"rank {other_rank} has the replica {its_replica} and the peers {its_peers}, rank {rank} the replica "
                f"{replica} and the peers {peers}; replicas must be of one size, and each rank have a peer in every "
                "other replica"
            )
        if other_rank in replica and its_peers.index(other_rank) != peers.index(rank):
            raise ValueError(
                f"ranks {rank} and {other_rank} are of one replica {replica}, but have different places among their "
                f"peers {peers} and {its_peers}; build the groups from one mesh"
            )
