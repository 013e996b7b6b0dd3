"""BatchNorm at the anchor: its statistics are gathered there, the same on all ranks, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.testing import WorkerPool

pytestmark = pytest.mark.processes

SPECS: dict[str, Callable[[], Sync]] = {"diloco": lambda: diloco(every_steps=4), "dense": every_step}


def attached(kind: str, method: str) -> tuple[nn.Module, Attached]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2), nn.BatchNorm1d(2))
    group = None
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        group = mesh.get_group("replicate")
    elif kind == "ddp":
        model = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    return model, attach(model, optimizer, SPECS[method](), replicate_group=group)


def batch(rank: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return rank + torch.randn(8, 3, generator=generator)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): buffer.clone() for name, buffer in model.named_buffers()}


def gathered(kind: str, method: str, looks: bool) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], list[float]]:
    """The statistics within evaluation, the first mean as it should be; statistics and losses in the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, sync = attached(kind, method)
    shown: dict[str, Tensor] = {}
    wanted, losses = torch.zeros(0), []
    for step in range(6):
        loss = model(batch(rank, step)).square().mean() + model(batch(rank, step)).mean()
        loss.backward()
        sync.step()
        losses.append(float(loss.detach()))
        if looks and step == 2:
            model.eval()
            before = statistics(model)
            with sync.evaluation(recalibrate=lambda: [model(batch(rank, 50 + number)) for number in range(3)]):
                shown = statistics(model)
                assert not any(layer.training for layer in model.modules())
                first = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
                seen = torch.cat([batch(other, 50 + number) for other in range(world) for number in range(3)])
                with torch.no_grad():
                    model(seen)
                    if kind != "fsdp":  # whose weights are gathered only within its own forward pass
                        wanted = first(seen).mean(0)
            assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
            model.train()
    return shown, wanted, statistics(model), losses


@pytest.mark.parametrize(
    ("kind", "method"), [("plain", "diloco"), ("ddp", "diloco"), ("fsdp", "diloco"), ("ddp", "dense")]
)
def test_statistics_are_of_what_is_shown_on_all_ranks_and_looking_changes_nothing(
    pool: WorkerPool, kind: str, method: str
) -> None:
    world = 4 if kind == "fsdp" else 2
    looked = pool.run(gathered, kind, method, True, world=world)
    never = pool.run(gathered, kind, method, False, world=world)
    for (shown, wanted, left, losses), (_, _, own, theirs) in zip(looked, never, strict=True):
        assert losses == theirs and all(torch.equal(left[name], own[name]) for name in own)
        assert all(torch.equal(shown[name], looked[0][0][name]) for name in shown)
        if kind != "fsdp":
            torch.testing.assert_close(next(v for n, v in shown.items() if n.endswith("1.running_mean")), wanted)


def without_norms() -> str:
    model = nn.Linear(3, 2)
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), diloco(every_steps=4))
    try:
        with sync.evaluation(recalibrate=lambda: model(batch(0, 0))):
            return "evaluated"
    except ValueError as error:
        return str(error)


def test_recalibrating_nothing_is_refused(pool: WorkerPool) -> None:
    assert all("no BatchNorm" in message for message in pool.run(without_norms, world=2))
