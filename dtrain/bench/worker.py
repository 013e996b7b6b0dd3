"""One rank of `dtrain bench collectives`: ``python -m dtrain.bench.worker FOLDER``. Rank 0 appends to rows.jsonl."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dtrain.bench.measure import measure
from dtrain.bench.rows import append
from dtrain.bench.settings import Settings
from dtrain.bench.table import HEAD, line
from dtrain.comm.drivers.run import Channel


def main(folder: Path) -> None:
    """Sweep every op over every size."""
    settings = Settings.read(folder)
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if settings.transport == "mpi":
        from dtrain.comm.drivers.mpi import replicate_transport

        channel = Channel({"replicate": replicate_transport(world, 1, rank)})
    else:
        group = dist.new_group(list(range(world)))
        assert isinstance(group, dist.ProcessGroup)
        channel = Channel({"replicate": group})
    if rank == 0:
        print(HEAD, flush=True)
    for op in settings.ops:
        for size in settings.sizes():
            row = measure(op, size, settings, channel)
            if rank == 0:
                append(folder / "rows.jsonl", row)
                print(line(row), flush=True)
    channel.close()
    if settings.transport == "mpi":
        from dtrain.comm.drivers.mpi import finalize

        finalize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
