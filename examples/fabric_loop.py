"""A sync in a loop of Lightning Fabric: two replicas, with gradient accumulation.

Run: torchrun --standalone --nproc-per-node=2 examples/fabric_loop.py [--sync streaming]

Lines that end in `# dtrain` are what the sync takes.
"""

import torch
from lightning.fabric import Fabric
from methods import chosen  # dtrain
from torch.utils.data import DataLoader, TensorDataset

from dtrain.integrations.fabric import Synced  # dtrain

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
x = torch.randn(3200, 64)
loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=True))
model, optimizer = fabric.setup(model, optimizer)
synced = Synced(fabric, model, optimizer, chosen())  # dtrain

for epoch in range(2):
    for number, (x, y) in enumerate(loader):
        with fabric.no_backward_sync(model, enabled=number % 2 == 0):
            loss = (model(x) - y).square().mean()
            fabric.backward(loss)
        if number % 2:
            fabric.clip_gradients(model, optimizer, max_norm=10.0)
            optimizer.step()
            optimizer.zero_grad()
        if number % 33 == 0:
            fabric.print(f"epoch {epoch}, step {number}: loss {loss.item():.2f}")

fabric.print(synced.sync.report())  # dtrain
synced.close()  # dtrain
