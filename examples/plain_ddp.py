"""dtrain's hooks in a plain DDP loop: gradients cross the network in 8 bits, with error feedback.

Run: torchrun --standalone --nproc-per-node=2 examples/plain_ddp.py

Lines that end in `# dtrain` are what the sync takes.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, every_step  # dtrain
from dtrain.compress import error_feedback, quantize  # dtrain

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
sync = attach(model, optimizer, every_step(compress=error_feedback(quantize(bits=8))))  # dtrain

for step in range(100):
    x = torch.randn(32, 64)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    sync.step()  # dtrain, in place of: optimizer.step(); optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 33 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

print(sync.report())  # dtrain
dist.destroy_process_group()
