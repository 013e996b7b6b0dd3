"""Experts of one FSDP2 unit of which a step runs some, and units whose parameters lie on several meshes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from dtrain import attach, diloco, every_step
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize
from dtrain.testing import WorkerPool
from tests import torch_versions
from tests.comm.adapters.test_fsdp_units import close, whole

pytestmark = pytest.mark.processes

WIDTH = 5


class Experts(nn.Module):
    """A block of experts, one unit of FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.block = Block()

    def forward(self, x: Tensor, *chosen: int) -> Tensor:
        found: Tensor = self.block(torch.tanh(self.stem(x)), *chosen)
        return found.square().mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor, *chosen: int) -> Tensor:
        routed = torch.tanh(self.router(x))
        return torch.stack([self.experts[number](routed) for number in chosen]).sum(0)


def inputs(rank: int, step: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * rank + step))


# ---- experts without a gradient in some steps ------------------------------------------------------------------------


def routed(shards: int, flag: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every rank runs another expert in every step: the model, and what it ought to be."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))
    model, plain = Experts(), Experts()
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if flag:
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, plain)]
    sync = attach(model, optimizers[0], every_step())
    for step in range(4):
        model(inputs(dist.get_rank(), step), (dist.get_rank() + step) % 3).backward()
        sync.step()
        for rank in range(world):
            (plain(inputs(rank, step), (rank + step) % 3) / world).backward()
        for parameter in plain.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizers[1].step()
        optimizers[1].zero_grad()
    sync.detach()
    return whole(model), {fqn: p.detach() for fqn, p in plain.named_parameters()}


@torch_versions.UNUSED
@pytest.mark.parametrize("shards", [1, 2])
def test_experts_of_one_unit_are_trained_with_zeros_where_torch_is_asked_for_them(
    pool: WorkerPool, shards: int
) -> None:
    for found, expected in pool.run(routed, shards, True, world=2 * shards):
        close(found, expected)


def told() -> str:
    try:
        routed(1, False)
    except RuntimeError as error:
        return str(error)
    return ""


def test_without_that_the_ways_out_are_told(pool: WorkerPool) -> None:
    for message in pool.run(told, world=2):
        assert "give fully_shard each" in message and "set_reduce_scatter_unused_params" in message


# ---- units with parameters on several meshes -------------------------------------------------------------------------


def with_two_groups(native: bool, spec: Sync) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
    """How many groups the block has; the model, and one whose parameters are all on one mesh."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

    names = ("shard", "experts")
    both = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", name)) for name in names]
    dense, apart = both if native else [mesh[name] for mesh, name in zip(both, names, strict=True)]
    info: Any = HSDPMeshInfo(apart, 1, 0) if native else FSDPMeshInfo(apart, 0)
    results, counts = [], []
    for split in (True, False):
        model = Experts()
        of_experts = {id(p) for p in model.block.experts.parameters()} if split else set()

        def place(p: nn.Parameter, of_experts: set[int] = of_experts) -> ShardPlacementResult | None:
            return ShardPlacementResult(Shard(0), info) if id(p) in of_experts else None

        fully_shard(model.block, mesh=dense, shard_placement_fn=place)
        fully_shard(model, mesh=dense)
        counts.append(len(cast(Any, model.block)._get_fsdp_state()._fsdp_param_groups))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        peers = None if native else both[0].get_group("replicate")
        sync = attach(model, optimizer, spec, replicate_group=peers)
        for step in range(5):
            model(inputs(dist.get_rank(), step), 0, 1, 2).backward()
            assert sync.step()
        sync.close_round()
        sync.detach()
        results.append(whole(model))
    return counts, results[0], results[1]


@torch_versions.PLACED
@pytest.mark.parametrize("native", [False, True], ids=["shard axis", "native HSDP"])
def test_a_unit_may_have_a_group_of_parameters_for_each_mesh(pool: WorkerPool, native: bool) -> None:
    for spec in (every_step(), every_step(compress=error_feedback(quantize(bits=8))), diloco(every_steps=2)):
        rows = pool.run(with_two_groups, native, spec, world=4)
        for counts, apart, together in rows:
            assert counts == [2, 1]
            assert all(torch.equal(apart[fqn], rows[0][1][fqn]) for fqn in apart)
            close(apart, together)
