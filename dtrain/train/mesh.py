"""The mesh of a run: replicas x shards, and which process group carries what.

rank = replica * shards + shard          peers: the ranks of one shard;  a replica: the ranks of one row
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtrain.comm.channel import Channel
from dtrain.comm.transports.groups import kept_group
from dtrain.comm.transports.mpi import TIMEOUT_SECONDS, MpiTransport, replicate_transport
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.comm.transports.transport import SelfTransport, Transport
from dtrain.errors import ConfigError
from dtrain.launchers.environment import Environment
from dtrain.launchers.probe import HANG_SECONDS, note_collective

# The probe ends a hanging rank and writes its stacks; it looks every few seconds and must act before this timeout.
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

    def close(self) -> None:
        """Free the groups, once nothing is under way; the engine's stays. Every rank must call it."""
        for channel in (self.channel, self.control):
            channel.close(timeout_seconds=2.0)

    def shard_mesh(self) -> DeviceMesh:
        """The shard axis as a one-dimensional device mesh, for FSDP2."""
        return DeviceMesh.from_group(self.engine_group, self.device.type, mesh_dim_names=("shard",))


def build_mesh(replicas: int, shards: int, transport: Literal["torch", "mpi"] = "torch") -> Mesh:
    """Create the groups of a run. Collective; the default process group must exist and hold replicas x shards ranks.

    ``transport``: what carries the replicate axis; everything else stays with torch.distributed. Raises ``ValueError``
    if the group is of another size, ``RuntimeError`` if there is no MPI or it numbers the ranks differently.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world != replicas * shards:
        raise ValueError(f"{world} processes cannot form {replicas} replicas x {shards} shards")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    row = list(range(rank - rank % shards, rank - rank % shards + shards))
    peers: Transport
    if transport == "mpi":
        peers = _over_mpi(replicas, shards, rank)
    else:
        peers = TorchTransport.between(range(rank % shards, world, shards))
    return Mesh(
        replicas=replicas,
        shards=shards,
        replica=rank // shards,
        shard=rank % shards,
        device=device,
        engine_group=kept_group(row),
        channel=Channel({"replicate": peers, "shard": TorchTransport.between(row) if shards > 1 else SelfTransport()}),
        control=Channel({"replicate": TorchTransport.between(range(world), backend="gloo")}),
    )


def own_device() -> torch.device:
    """This rank's GPU, which becomes the current one, or the processor where there is none.

    Raises ``ConfigError`` for fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = Environment.read(os.environ).local_rank, torch.cuda.device_count()
    if gpus == 1:  # a launcher may show each rank its own GPU alone
        local_rank = 0
    if local_rank >= gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own, there are {gpus}: take fewer launcher.workers"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _over_mpi(replicas: int, shards: int, rank: int) -> MpiTransport:
    """The replicate axis over MPI, under the launcher's limit (launcher.hang_seconds; 0 or none: torch's own)."""
    hang_seconds = float(os.environ.get(HANG_SECONDS, "0"))
    timeout = hang_seconds + PROBE_FIRST_SECONDS if hang_seconds else TIMEOUT_SECONDS
    watch = functools.partial(note_collective, f"replicate-{rank % shards} over MPI")
    return replicate_transport(replicas, shards, rank, timeout_seconds=timeout, watch=watch)


def patience(backend: str) -> timedelta:
    """The timeout of torch's collectives: torch's own, or longer where launcher.hang_seconds is.

    >>> patience("gloo")
    datetime.timedelta(seconds=1800)
    """
    limit = timedelta(seconds=float(os.environ.get(HANG_SECONDS, "0")) + PROBE_FIRST_SECONDS)
    return max(limit, timedelta(minutes=10) if backend == "nccl" else dist.default_pg_timeout)
