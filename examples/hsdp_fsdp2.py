"""A sync on native HSDP: the mesh with a replicate and a shard axis that a training has already.

Model, mesh, optimizer and scheduler are made as without dtrain; `attach` finds the replicas in the mesh.

Run: torchrun --standalone --nproc-per-node=4 examples/hsdp_fsdp2.py [--sync streaming]

Lines that end in `# dtrain` are what the sync takes.
"""

import torch
import torch.distributed as dist
from methods import chosen
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain import attach  # dtrain


class Block(nn.Module):
    """An MLP beside a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), *(Block(32) for _ in range(3)), nn.Linear(32, 1))
for block in model[1:-1]:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
sync = attach(model, optimizer, chosen())  # dtrain

torch.manual_seed(1 + dist.get_rank())
for step in range(60):
    x = torch.randn(32, 64)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    sync.step()  # dtrain, in place of: optimizer.step(); optimizer.zero_grad()
    scheduler.step()
    if dist.get_rank() == 0 and step % 20 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

sync.close_round()  # dtrain
sync.detach()  # dtrain: the model is native HSDP again
dist.destroy_process_group()
