"""Training by forward passes only, with one byte per machine and sample, among machines that come and go.

    dtrain members --port 29400 &
    for _ in 1 2 3; do python examples/one_byte_members.py localhost:29400 runs/log & done

Kill one, and the others continue; start another, and it replays a log up to their step, or copies their weights if that
is faster, as with so few parameters. In the end all weights are bitwise equal, and so are those of a replayed log. Give
each run a folder of its own.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain import Members, attach, one_byte
from dtrain.comm.shared_seed.replay import replay
from dtrain.comm.shared_seed.update_log import read

address, folder, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 5000
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # this machine's own ranks: one
torch.manual_seed(0)
net = torch.nn.Linear(32, 1)
first = {name: value.clone() for name, value in net.state_dict().items()}
model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)  # only its learning rate is used; it is never stepped
members = Members(address, replicas=3)
sync = attach(model, optimizer, one_byte(samples=2, log=folder), members=members)

while sync.steps < steps:  # a newcomer starts at the others' step
    step = sync.steps
    generator = torch.Generator().manual_seed(1000 * step + members.id)  # this machine's share of the data
    x = torch.randn(64, 32, generator=generator)
    for _ in range(2):
        loss = sync.estimate(lambda x=x: (model(x) - x.sum(1, keepdim=True)).square().mean())
    sync.step()
    if step % 100 == 99:
        print(f"step {step}: machine {members.id}, one of {members.place.size}, loss {loss:.3f}")

print(f"{sync.report()}\nmachine {members.id} ends with the weights {sync.digest():016x}")
if members.came_by != "weights":  # otherwise its log begins with copied weights
    weights, _, replayed = replay(read(f"{folder}/machine-{members.id}.log"), first)
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    print(f"its log of {replayed} steps reproduces them")
sync.detach()
dist.destroy_process_group()
