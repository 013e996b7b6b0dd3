"""DiLoCo on your own FSDP2 model: two replicas of two ranks each exchange how far they moved every 10 steps.

Run: torchrun --standalone --nproc-per-node=4 examples/diloco_fsdp2.py

Lines that end in `# dtrain` are what the sync takes.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain import attach, diloco  # dtrain

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
fully_shard(model, mesh=mesh["shard"])  # dtrain, in place of: fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
sync = attach(model, optimizer, diloco(every_steps=10), replicate_group=mesh.get_group("replicate"))  # dtrain

torch.manual_seed(1 + dist.get_rank())
for step in range(200):
    x = torch.randn(32, 64)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    sync.step()  # dtrain, in place of: optimizer.step(); optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 66 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

sync.close_round()  # dtrain: combines the steps since the last round; evaluate and export the model behind it
x = torch.randn(256, 64)
loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
if dist.get_rank() == 0:
    print(f"step {step}: loss {loss.item():.2f} of what all replicas share")
dist.destroy_process_group()
