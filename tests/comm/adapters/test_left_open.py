"""What is dropped without detach() leaves nothing behind in a process that goes on: groups of gloo have threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, every_step
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, small

pytestmark = pytest.mark.processes


def threads_of_gloo() -> int:
    """Of this process: one for each group that is open, or was left."""
    return sum(name.read_text() == "gloo_tcp_loop\n" for name in Path("/proc/self/task").glob("*/comm"))


def dropped(kind: str) -> int:
    """A step; how many threads of gloo there are in the end."""
    model: torch.nn.Module = small()
    group = None
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        group = mesh.get_group("replicate")
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step(), replicate_group=group)
    backward(model, 0, 0)
    sync.step()
    return threads_of_gloo()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_is_dropped_leaves_nothing_behind(kind: str) -> None:
    with WorkerPool(2) as fresh:
        threads = [fresh.run(dropped, kind)[0] for _ in range(4)]
    assert threads[3] == threads[1] and threads[1] > 0
