"""A trainer built like torchtitan's: native HSDP on a mesh of two axes, a container of optimizers, checkpoints by DCP.

Run: torchrun --standalone --nproc-per-node=4 examples/torchtitan_style.py FOLDER STEPS [--sync streaming]
and again with more STEPS: it resumes from the state in FOLDER, also within a round.

Lines that end in `# dtrain` are what the sync takes; without them it is native HSDP. Where they stand in torchtitan's
own trainer: docs/integrations/torchtitan.md.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from methods import chosen
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from dtrain import attach  # dtrain


class Block(nn.Module):
    """An MLP beside a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Weights(Stateful):
    """The parameters of all parts of the model under their own names."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts

    def state_dict(self) -> dict:
        return {name: value for part in self.parts for name, value in get_model_state_dict(part).items()}

    def load_state_dict(self, state: dict) -> None:
        for part in self.parts:
            set_model_state_dict(part, state, options=StateDictOptions(strict=False))


class OptimizersContainer(torch.optim.Optimizer, Stateful):
    """An optimizer for each part of the model, stepped together; itself one, so that hooks can be registered."""

    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, parts: list[nn.Module], **settings: float) -> None:
        self.parts = parts
        self.optimizers = [torch.optim.AdamW(part.parameters(), **settings) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], settings)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        pairs = zip(self.parts, self.optimizers, strict=True)
        return {n: v for part, one in pairs for n, v in get_optimizer_state_dict(part, one, options=self.flat).items()}

    def load_state_dict(self, state: dict) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state, options=self.flat)


folder, steps = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), *(Block(32) for _ in range(3)), nn.Linear(32, 1))
for block in model[1:-1]:
    fully_shard(block, mesh=mesh)
model_parts = [fully_shard(model, mesh=mesh)]
optimizers = OptimizersContainer(model_parts, lr=5e-3)
scheduler = LambdaLR(optimizers.optimizers[0], lambda step: 0.98**step)
states = {"model": Weights(model_parts), "optimizer": optimizers, "lr_scheduler": scheduler}
sync = attach(model_parts[0], optimizers, chosen(), forward_steps=True)  # dtrain
states["sync"] = sync.checkpoint  # dtrain: DCP loads in the order of names, and this has to come behind the model
if (folder / ".metadata").exists():
    dcp.load(states, checkpoint_id=folder)

for step in range(scheduler.last_epoch, steps):
    optimizers.zero_grad()
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(32, 64, generator=generator)
    loss = (model_parts[0](x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model_parts[0].parameters(), 10.0)
    optimizers.step()
    scheduler.step()
    if dist.get_rank() == 0 and step % 25 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

with sync.evaluation(), torch.no_grad():  # dtrain, in place of: with torch.no_grad():
    dcp.save(states, checkpoint_id=folder)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    loss = (model_parts[0](x) - x.sum(1, keepdim=True)).square().mean().item()
print(f"rank {dist.get_rank()}: validation loss {loss!r} after {steps} steps")
dist.destroy_process_group()
