"""Frozen parameters and buffers that each rank has drawn for itself are one model's after attach."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step
from dtrain.comm.adapters.untrained_tensors import equalized
from dtrain.comm.ops import Place
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.simulate import simulate
from dtrain.testing import WorkerPool


class Features(nn.Module):
    """A trained layer behind random features; ``seed`` is the rank's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("noise", torch.randn(8))
        self.register_buffer("mask", torch.rand(8) > 0.5, persistent=False)
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.frozen(x) + self.noise))
        return found


def held(model: nn.Module) -> dict[str, Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name.removeprefix("module."): (t.to_local() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in found.items()
    }


def attached(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model: nn.Module = Features(dist.get_rank())
    group = None
    spec: Sync = diloco(every_steps=3)
    if kind == "ddp":  # as torch builds it where nobody wants its broadcast
        model = DistributedDataParallel(model, init_sync=False)
        spec = every_step()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        group = mesh.get_group("replicate")
    before = held(model)
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), spec, replicate_group=group)
    after = held(model)
    sync.detach()
    return before, after


@pytest.mark.parametrize("kind", ["plain", "fsdp", "ddp"])
def test_all_replicas_are_replica_0s(pool: WorkerPool, kind: str) -> None:
    (first, one), (second, other) = pool.run(attached, kind, world=2)
    assert not torch.equal(first["frozen.weight"], second["frozen.weight"]) and int(second["count"]) == 1
    for name, value in first.items():
        assert torch.equal(one[name], value) and torch.equal(other[name], value), name


def test_replicas_that_are_equal_are_left_alone() -> None:
    models = [Features(3) for _ in range(3)]
    kept = held(models[1])
    assert simulate([equalized(model, Place(rank, 3)) for rank, model in enumerate(models)]) == [[], [], []]
    assert all(torch.equal(kept[name], value) for name, value in held(models[1]).items())


def test_only_what_differs_is_sent() -> None:
    models = [Features(3) for _ in range(3)]
    models[2].noise[1] += 1  # type: ignore[index,operator]
    assert simulate([equalized(model, Place(rank, 3)) for rank, model in enumerate(models)]) == [["noise"]] * 3
    assert torch.equal(held(models[0])["noise"], held(models[2])["noise"])


def test_other_buffers_are_another_model() -> None:
    models = [Features(3), Features(3)]
    models[1].register_buffer("more", torch.zeros(2))
    with pytest.raises(ValueError, match=r"replicas \[1\] have other frozen parameters or buffers"):
        simulate([equalized(model, Place(rank, 2)) for rank, model in enumerate(models)])
