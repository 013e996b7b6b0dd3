"""DiLoCo among replicas that come and go: each is a run of its own; they meet at a store.

    dtrain members --port 29400 &
    for _ in 1 2 3; do python examples/come_and_go.py localhost:29400 0.05 & done

They start when three have connected; a step takes at least 0.05 seconds. Kill one, and the others continue; start
another, and it joins at the end of a round. Replicas elsewhere need the secret file that `dtrain members` names.
"""

import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain import Members, attach, diloco
from dtrain.compress import quantize

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # this replica's own ranks: one
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
members = Members(sys.argv[1], replicas=3)
sync = attach(model, optimizer, diloco(every_steps=20, compress=quantize(bits=8)), members=members)

while sync.steps < 400:  # a newcomer starts at the others' step
    generator = torch.Generator().manual_seed(1000 * sync.steps + members.slot)  # this replica's share of the data
    x = torch.randn(32, 64, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    sync.step()
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
    if sync.steps % 100 == 1:
        print(f"step {sync.steps}: replica {members.slot} of {members.place.size}, loss {loss.item():.2f}", flush=True)

sync.close_round()
print(sync.report())
sync.detach()
dist.destroy_process_group()
