"""A sync in a loop of Hugging Face Accelerate: two replicas, with gradient accumulation.

Run: torchrun --standalone --nproc-per-node=2 examples/accelerate_loop.py [--sync streaming]

Lines that end in `# dtrain` are what the sync takes.
"""

import torch
from accelerate import Accelerator
from methods import chosen  # dtrain
from torch.utils.data import DataLoader, TensorDataset

from dtrain.integrations.accelerate import Synced  # dtrain

accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
x = torch.randn(3200, 64)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
synced = Synced(accelerator, model, optimizer, chosen())  # dtrain

for _ in range(2):
    for number, (x, y) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if number % 33 == 0:
            accelerator.print(f"step {number // 2}: loss {loss.item():.2f}")

accelerator.print(synced.sync.report())  # dtrain
synced.close()  # dtrain
accelerator.end_training()
