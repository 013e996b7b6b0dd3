"""Stops in the middle of a DiLoCo round and resumes bit-identically.

Run: torchrun --standalone --nproc-per-node=2 examples/save_and_resume.py FOLDER STEPS
and again with more STEPS: it resumes from the state in FOLDER.

Lines that end in `# dtrain` are what the sync takes.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco  # dtrain

dist.init_process_group("gloo")
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=200)
sync = attach(model, optimizer, diloco(every_steps=20))  # dtrain: first attach, then load

if (folder / "scheduler.pt").exists():
    sync.load(folder)  # dtrain: this rank's own file, since within a round the replicas differ
    scheduler.load_state_dict(torch.load(folder / "scheduler.pt"))

for step in range(scheduler.last_epoch, steps):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(32, 64, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    sync.step()  # dtrain, in place of: optimizer.step(); optimizer.zero_grad()
    scheduler.step()

sync.save(folder)  # dtrain, in place of: folder.mkdir(exist_ok=True)
if dist.get_rank() == 0:
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    print(f"step {steps}: sum of all parameters {total!r}")
dist.destroy_process_group()
