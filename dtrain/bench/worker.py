"""One rank of `dtrain bench collectives`: ``python -m dtrain.bench.worker FOLDER/bench.json``.

Rank 0 appends to rows.jsonl beside it, and writes environment.json: where and with what the figures were made.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dtrain.bench.measure import Bench
from dtrain.bench.rows import append
from dtrain.bench.settings import Settings
from dtrain.bench.table import HEAD, line
from dtrain.comm.drivers.run import Channel
from dtrain.launchers.environment import Environment
from dtrain.report.environment import record

__all__ = ["main"]


def main(path: Path) -> None:
    """Sweep every op over every size."""
    settings = Settings.read(path)
    device = _device()
    native = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(native)
    rank, world = dist.get_rank(), dist.get_world_size()
    control = _group(world, "gloo")
    if settings.transport == "mpi":
        from dtrain.comm.drivers.mpi import replicate_transport

        channel = Channel({"replicate": replicate_transport(world, 1, rank)})
    else:
        channel = Channel({"replicate": _group(world, native)})
    bench = Bench(
        settings, channel, device, control=control,
        backends=(native, "mpi" if settings.transport == "mpi" else native),
    )  # fmt: skip
    if rank == 0:
        (path.parent / "environment.json").write_text(json.dumps(record(), indent=1) + "\n")
        print(HEAD, flush=True)
    for op in settings.ops:
        for size in settings.sizes():
            row = bench.measure(op, size)
            if rank == 0:
                append(path.parent / "rows.jsonl", row)
                print(line(row), flush=True)
    channel.close()
    if settings.transport == "mpi":
        from dtrain.comm.drivers.mpi import finalize

        finalize()
    dist.destroy_process_group()


def _device() -> torch.device:
    """This rank's GPU, or the processor where there is none. Raises ``RuntimeError`` for fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, gpus = Environment.read(os.environ).local_rank, torch.cuda.device_count()
    if gpus == 1:  # a launcher may show each rank its own GPU alone
        here = 0
    if here >= gpus:
        raise RuntimeError(f"local rank {here} has no GPU of its own, there are {gpus}: take fewer launcher.workers")
    torch.cuda.set_device(here)
    return torch.device("cuda", here)


def _group(world: int, backend: str) -> dist.ProcessGroup:
    group = dist.new_group(list(range(world)), backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return group


if __name__ == "__main__":
    main(Path(sys.argv[1]))
