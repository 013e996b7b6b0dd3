"""What was applied is what was meant less what is left over: on real engines, through their own hooks.

sum_t result_t = sum_t mean_i g_i,t - mean_i e_i        to 1e-9 in fp64 (DDP, FSDP2), to 1e-6 in fp32 (ZeRO)
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, every_step
from dtrain.comm.feedback import Compression
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.attached import Attached
from dtrain.compress import econtrol, error_feedback, powersgd, quantize, sign, topk
from dtrain.testing import WorkerPool
from dtrain.train.engines import EngineOptions, build_engine
from dtrain.train.mesh import build_mesh

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

STEPS, REPLICAS, SHARDS = 12, 2, 2
METHODS = {
    "top-k": lambda: error_feedback(topk(0.1)),
    "least squares": lambda: error_feedback(quantize("least_squares", bits=2, block=16)),
    "sign": lambda: econtrol(sign(block=8), eta=0.1),
    "PowerSGD": lambda: error_feedback(powersgd(1, min_rate=1.0)),
}


@dataclass
class Sums:
    """What one rank has seen. ``meant``: its own whole gradients; the others: pieces, from element ``offset``."""

    meant: dict[str, Tensor]
    applied: dict[str, Tensor]
    left: dict[str, Tensor]
    offset: dict[str, int]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(9, 14), nn.Linear(14, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.second(torch.tanh(self.first(batch["x"]))).square().mean()
        return loss


def data(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return {"x": torch.randn(4, 9, generator=generator).to(dtype)}


def observed(engine: str, method: str) -> Sums:
    compression: Compression = METHODS[method]()
    if engine in ("ddp", "fsdp"):
        return on_torch(engine, compression)
    return on_zero(engine, compression)


def on_torch(engine: str, compression: Compression) -> Sums:
    """fp64. The parameters stand still, so that the gradients of every rank are known beforehand."""
    plain, model = Net().double(), Net().double()
    mesh = init_device_mesh("cpu", (REPLICAS, SHARDS), mesh_dim_names=("replicate", "shard"))
    wrapped: nn.Module
    if engine == "fsdp":
        fully_shard(model, mesh=mesh["shard"])
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    group = mesh.get_group("replicate")
    attached = attach(wrapped, optimizer, every_step(compress=compression), replicate_group=group)
    names = {name.removeprefix("module."): p for name, p in wrapped.named_parameters()}
    sums = Sums({}, {}, {}, {})
    for step in range(STEPS):
        add_meant(sums, plain, step, torch.float64)
        wrapped(data(step, torch.float64)).backward()
        attached.finish()
        for fqn, segment in attached.pieces.segments.items():
            gradient = names[fqn].grad
            assert gradient is not None
            flat = gradient.to_local().reshape(-1) if isinstance(gradient, DTensor) else gradient.reshape(-1)
            if not isinstance(gradient, DTensor):
                flat = flat[segment.offset : segment.stop]
            sums.applied[fqn] = sums.applied.get(fqn, torch.zeros_like(flat)) + flat
        attached.step()
    return ended(sums, attached, attached.pieces)


def on_zero(name: str, compression: Compression) -> Sums:
    """fp32: what DeepSpeed works in."""
    mesh = build_mesh(REPLICAS, SHARDS)
    options = EngineOptions(
        precision="fp32", activation_checkpointing=False, bucket_mib=1, clip_norm=0.0, microbatches=1, microbatch_size=4
    )
    engine = build_engine(name, Net(), lambda model: torch.optim.SGD(model.parameters(), lr=0.0), mesh, options)
    attached = every_step(compress=compression).bind(engine.pieces, 0)
    plain = Net()
    sums = Sums({}, {}, {}, {})
    for step in range(STEPS):
        add_meant(sums, plain, step, torch.float32)
        engine.forward_backward([data(step, torch.float32)])
        attached.finish()
        for fqn, home in engine.pieces.homes.items():  # type: ignore[attr-defined]
            flat = engine.pieces._gradient(home).clone().double()  # type: ignore[attr-defined]
            sums.applied[fqn] = sums.applied.get(fqn, torch.zeros_like(flat)) + flat
        attached.step()
    found = ended(sums, attached, engine.pieces)
    mesh.control.close()
    engine.close()
    return found


def add_meant(sums: Sums, plain: Net, step: int, dtype: torch.dtype) -> None:
    gradients = torch.autograd.grad(plain(data(step, dtype)), list(plain.parameters()))
    for (fqn, _), gradient in zip(plain.named_parameters(), gradients, strict=True):
        flat = gradient.reshape(-1).double()
        sums.meant[fqn] = sums.meant.get(fqn, torch.zeros_like(flat)) + flat


def ended(sums: Sums, attached: Attached, pieces: Pieces) -> Sums:
    for fqn, segment in pieces.segments.items():
        like = torch.zeros(segment.numel, dtype=torch.float64)
        sums.left[fqn] = attached.state.get(fqn, "residual", like).double()
        sums.offset[fqn] = segment.offset
    attached.detach()
    return sums


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("engine", "tolerance"), [("ddp", 1e-9), ("fsdp", 1e-9), ("zero1", 1e-6), ("zero3", 1e-6)])
def test_nothing_is_lost_on_its_way_through_an_engine(
    pool: WorkerPool, engine: str, tolerance: float, method: str
) -> None:
    found = pool.run(observed, engine, method)
    for rank, mine in enumerate(found):
        peers = [found[replica * SHARDS + rank % SHARDS] for replica in range(REPLICAS)]
        for fqn, applied in mine.applied.items():
            own = slice(mine.offset[fqn], mine.offset[fqn] + applied.numel())
            meant = torch.stack([everybody.meant[fqn][own] for everybody in found]).mean(0)
            left = torch.stack([peer.left[fqn] for peer in peers]).mean(0)
            scale = max(float(meant.abs().max()), float(left.abs().max())) if applied.numel() else 1.0
            error = float((applied.double() - (meant - left)).abs().max()) if applied.numel() else 0.0
            assert error <= tolerance * scale, (fqn, error / scale)
            assert all(torch.equal(peer.applied[fqn], applied) for peer in peers)
