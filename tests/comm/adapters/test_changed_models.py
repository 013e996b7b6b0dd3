"""A model or an optimizer that is no longer what it was at attach: what a sync does not know, it says so of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step, fedkseed, local_sgd
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, small

pytestmark = pytest.mark.processes

Change = Callable[[nn.Sequential, torch.optim.Optimizer], None]


def unfreeze(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net[0].requires_grad_(True)


def add_a_layer(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net.append(nn.Linear(3, 3))


def replace_the_head(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net[2] = nn.Linear(19, 3)
    optimizer.add_param_group({"params": list(net[2].parameters())})


def replace_a_parameter(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net[2].weight = nn.Parameter(torch.zeros(3, 19))


def another_group(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def other_numbers(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net.double()


def a_frozen_layer(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net.append(nn.Linear(3, 3).requires_grad_(False))


def freeze(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net[2].bias.requires_grad_(False)


def take_out(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    net[1] = nn.Identity()
    del optimizer.param_groups[0]["params"][-1:]


def two_replicas() -> DeviceMesh:
    """Made first in a job: torch keeps the mesh of a process's first sharded parameter, and its group by name."""
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))


def attached_to(
    mesh: DeviceMesh, engine: str, sync: Sync
) -> tuple[nn.Sequential, nn.Module, torch.optim.Optimizer, Attached]:
    """A small model, its first layer frozen, in ``engine``; its optimizer knows all of it."""
    net = small()
    net[0].requires_grad_(False)
    model: nn.Module = net
    group = None
    if engine == "ddp":
        model = DistributedDataParallel(net, find_unused_parameters=True)
    if engine == "fsdp":
        fully_shard(net[0], mesh=mesh["shard"])
        fully_shard(net, mesh=mesh["shard"])
        group = mesh.get_group("replicate")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return net, model, optimizer, attach(model, optimizer, sync, replicate_group=group)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


def said_of(mesh: DeviceMesh, engine: str, sync: Sync, change: Change) -> tuple[int, str]:
    """Steps that were made, and what was said, with ``change`` after two of five."""
    net, model, optimizer, attached = attached_to(mesh, engine, sync)
    dtype = torch.float32
    try:
        for step in range(5):
            if step == 2:
                change(net, optimizer)
                dtype = torch.float64 if change is other_numbers else dtype
            x = torch.full((5, 7), 1.0 + dist.get_rank(), dtype=dtype)
            if sync is FORWARD_ONLY:
                attached.estimate(partial(loss_of, model, x))
            else:
                loss_of(model, x).backward()
            attached.step()
    except RuntimeError as error:
        return attached.steps, str(error)
    finally:
        attached.detach()
    return attached.steps, ""


def all_said(cases: str) -> list[tuple[int, str]]:
    mesh = two_replicas()
    return [said_of(mesh, *case) for case in (CHANGES if cases == "changes" else FINE)]


def the_way_out(engine: str) -> tuple[Tensor, Tensor]:
    """Unfrozen in the middle of a round, then attached to again: the model, and what was unfrozen, after a round."""
    mesh = two_replicas()
    net, model, optimizer, attached = attached_to(mesh, engine, diloco(every_steps=4))
    group = mesh.get_group("replicate") if engine == "fsdp" else None
    for step in range(10):
        if step == 2:
            net[0].requires_grad_(True)
            attached.close_round()
            attached.detach()
            attached = attach(model, optimizer, diloco(every_steps=4), replicate_group=group)
        backward(model, dist.get_rank(), step)
        attached.step()
    attached.close_round()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole]), whole[0].detach().clone()


FORWARD_ONLY = fedkseed(every_steps=2)

CHANGES: list[tuple[str, Sync, Change]] = [
    ("plain", diloco(every_steps=2), unfreeze),
    ("ddp", diloco(every_steps=2), unfreeze),
    ("ddp", every_step(), unfreeze),
    ("fsdp", every_step(), unfreeze),
    ("fsdp", local_sgd(every_steps=2), unfreeze),
    ("plain", FORWARD_ONLY, unfreeze),
    ("plain", diloco(every_steps=2), add_a_layer),
    ("plain", diloco(every_steps=2), replace_the_head),
    ("plain", diloco(every_steps=2), replace_a_parameter),
    ("ddp", diloco(every_steps=2), replace_a_parameter),
    ("plain", diloco(every_steps=2), another_group),
    ("ddp", every_step(), another_group),
    ("plain", diloco(every_steps=2), other_numbers),
]

FINE: list[tuple[str, Sync, Change]] = [
    ("plain", diloco(every_steps=2), take_out),
    ("ddp", diloco(every_steps=2), take_out),
    ("plain", diloco(every_steps=2), freeze),
    ("ddp", diloco(every_steps=2), freeze),
    ("ddp", every_step(), freeze),
    ("fsdp", diloco(every_steps=2), freeze),
    ("fsdp", every_step(), freeze),
    ("plain", diloco(every_steps=2), a_frozen_layer),
]


def test_what_a_sync_does_not_know_is_told_before_the_next_step_on_all_ranks(pool: WorkerPool) -> None:
    one, other = pool.run(all_said, "changes", world=2)
    assert one == other
    assert [steps for steps, _ in one] == len(CHANGES) * [2]
    assert all("sync.detach(), and attach" in words for _, words in one)
    assert "0.weight and 1 more became trainable" in one[0][1]
    assert "float64" in one[-1][1]


def test_what_is_frozen_or_taken_out_after_attach_is_no_longer_trained_and_that_is_all(pool: WorkerPool) -> None:
    assert pool.run(all_said, "fine", world=2) == 2 * [len(FINE) * [(5, "")]]


@pytest.mark.parametrize("engine", ["plain", "fsdp"])
def test_a_layer_is_unfrozen_between_two_syncs(pool: WorkerPool, engine: str) -> None:
    (one, layer), (other, _) = pool.run(the_way_out, engine, world=2)
    assert torch.equal(one, other)
    assert not torch.equal(layer, next(small().parameters()).detach())
