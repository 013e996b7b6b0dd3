"""The mesh of a run: replicas x shards, and which process group carries what.

rank = replica * shards + shard          peers: the ranks of one shard;  a replica: the ranks of one row
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtrain.comm.drivers.mpi import TIMEOUT_SECONDS, MpiTransport, replicate_transport
from dtrain.comm.drivers.run import Channel
from dtrain.comm.drivers.transport import Alone
from dtrain.launchers.probe import HANG_SECONDS, note_collective

# The probe ends a rank that hangs, with its stacks, and looks every few seconds; it is to be the first to do so.
PROBE_FIRST_SECONDS = 30.0


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the mesh. Made by `build_mesh` on every rank.

    ``engine_group``: this replica's group, for the engine alone. ``channel``: the sync's own groups and worker thread.
    ``control``: all ranks, gloo, for votes, metrics and barriers.
    """

    replicas: int
    shards: int
    replica: int
    shard: int
    device: torch.device
    engine_group: dist.ProcessGroup
    channel: Channel
    control: Channel

    @property
    def rank(self) -> int:
        return self.replica * self.shards + self.shard

    @property
    def world(self) -> int:
        return self.replicas * self.shards

    def shard_mesh(self) -> DeviceMesh:
        """The shard axis as a one-dimensional device mesh, for FSDP2."""
        return DeviceMesh.from_group(self.engine_group, self.device.type, mesh_dim_names=("shard",))


def build_mesh(replicas: int, shards: int, transport: Literal["torch", "mpi"] = "torch") -> Mesh:
    """Create the groups of a run. Collective; the default process group must exist and hold replicas x shards ranks.

    ``transport``: what carries the replicate axis; everything else stays with torch.distributed. Raises ``ValueError``
    if the group is of another size, ``RuntimeError`` if there is no MPI or it counts the ranks in another way.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world != replicas * shards:
        raise ValueError(f"{world} processes cannot form {replicas} replicas x {shards} shards")
    rows = [[replica * shards + shard for shard in range(shards)] for replica in range(replicas)]
    columns = [[replica * shards + shard for replica in range(replicas)] for shard in range(shards)]
    everybody = [list(range(world))]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    peers = _over_mpi(replicas, shards, rank) if transport == "mpi" else _group(columns)
    return Mesh(
        replicas=replicas,
        shards=shards,
        replica=rank // shards,
        shard=rank % shards,
        device=device,
        engine_group=_group(rows),
        channel=Channel({"replicate": peers, "shard": _group(rows) if shards > 1 else Alone()}),
        control=Channel({"replicate": _group(everybody, backend="gloo")}),
    )


def _over_mpi(replicas: int, shards: int, rank: int) -> MpiTransport:
    """The replicate axis over MPI, under the launcher's limit (launcher.hang_seconds; 0 or none: torch's own)."""
    hang_seconds = float(os.environ.get(HANG_SECONDS, "0"))
    timeout = hang_seconds + PROBE_FIRST_SECONDS if hang_seconds else TIMEOUT_SECONDS
    watch = functools.partial(note_collective, f"replicate-{rank % shards} over MPI")
    return replicate_transport(replicas, shards, rank, timeout_seconds=timeout, watch=watch)


def _group(partition: Sequence[Sequence[int]], backend: str | None = None) -> dist.ProcessGroup:
    """This rank's group of a partition of all ranks; every rank creates all of them, in the same order."""
    mine = None
    for ranks in partition:
        group = dist.new_group(list(ranks), backend=backend)
        if dist.get_rank() in ranks:
            mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return mine
