"""What is dropped without detach() leaves nothing behind in a process that goes on: groups of gloo have threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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


def dropped(kind: str, groups_before: int = 0) -> int:
    """A step; how many threads of gloo there are in the end."""
    for _ in range(groups_before):  # what follows gets other names
        dist.new_group([0, 1])
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


def test_a_mesh_is_not_taken_for_one_of_an_earlier_job() -> None:
    """DTensor remembers results by mesh, and a mesh is equal to that of an earlier job, whose groups are gone."""
    with WorkerPool(2) as fresh:
        for groups_before in (5, 0):
            fresh.run(dropped, "fsdp", groups_before)
