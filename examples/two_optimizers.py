"""Two optimizers over one model, Muon for the matrices of its blocks and AdamW for the rest; each has its scheduler.

Run: torchrun --standalone --nproc-per-node=2 examples/two_optimizers.py [--sync streaming]

Lines that end in `# dtrain` are what the sync takes; without them it is plain data parallelism.
"""

import torch
import torch.distributed as dist
from methods import chosen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR

from dtrain import attach  # dtrain


class Block(nn.Module):
    """An MLP beside a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 32), *(Block(32) for _ in range(3)), nn.Linear(32, 1)))
matrices = [p for block in model.module[1:-1] for p in block.parameters() if p.dim() == 2]
others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]
schedulers = [LinearLR(optimizer, 1.0, 0.2, total_iters=80) for optimizer in optimizers]
sync = attach(model, optimizers, chosen(), forward_steps=True)  # dtrain

torch.manual_seed(1 + dist.get_rank())
for step in range(100):
    x = torch.randn(32, 64)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    if dist.get_rank() == 0 and step % 33 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

sync.close_round()  # dtrain
dist.destroy_process_group()
