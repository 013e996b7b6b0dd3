"""A sync in a loop of Accelerate with FSDP2: two replicas of two GPUs each.

Run: accelerate launch --num-processes 4 examples/accelerate_fsdp2.py [--sync streaming]

Accelerate offers FSDP2 on GPUs alone.

Lines that end in `# dtrain` are what the sync takes.
"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from methods import chosen  # dtrain
from torch.utils.data import DataLoader, TensorDataset

from dtrain.integrations.accelerate import Synced  # dtrain

accelerator = Accelerator(
    fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1000),
    parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2),
)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
x = torch.randn(3200, 64)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
synced = Synced(accelerator, model, optimizer, chosen())  # dtrain

for _ in range(2):
    for number, (x, y) in enumerate(loader):
        loss = (model(x) - y).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if number % 24 == 0:
            accelerator.print(f"step {number}: loss {loss.item():.2f}")

accelerator.print(synced.sync.report())  # dtrain
synced.close()  # dtrain
accelerator.end_training()
