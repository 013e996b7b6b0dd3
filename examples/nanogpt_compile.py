"""A loop as nanoGPT's: torch.compile, DDP, gradient accumulation, autocast to bf16. Replicas exchange every 10 steps.

Run: torchrun --standalone --nproc-per-node=2 examples/nanogpt_compile.py [--sync streaming] [--backend aot_eager]

Lines that end in `# dtrain` are what the sync takes; without them it is plain data parallelism.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from methods import chosen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach  # dtrain

CONTEXT, WIDTH, HEADS, LAYERS, STEPS, MICROBATCHES = 64, 32, 4, 2, 60, 2


class Block(nn.Module):
    """Causal attention and an MLP, each beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.attn(self.ln_1(x)).split(WIDTH, 2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Bytes in, the loss of the next ones out; the embedding is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def batch(data: Tensor) -> tuple[Tensor, Tensor]:
    """Eight pieces of the text, and the same a byte later."""
    starts = torch.randint(len(data) - CONTEXT - 1, (8,)).tolist()
    pieces = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
    return pieces[:, :-1], pieces[:, 1:]


parser = argparse.ArgumentParser()
parser.add_argument("--backend", default="inductor", help="of torch.compile; inductor needs a C++ compiler")
options, _ = parser.parse_known_args()

dist.init_process_group("gloo")
text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
train, validation = text[:-5000], text[-5000:]
torch.manual_seed(0)
model = DistributedDataParallel(torch.compile(GPT(), backend=options.backend))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
autocast = torch.autocast("cpu", dtype=torch.bfloat16)
sync = attach(model, optimizer, chosen(), forward_steps=True)  # dtrain

torch.manual_seed(1 + dist.get_rank())
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * step / STEPS))
    for number in range(MICROBATCHES):
        model.require_backward_grad_sync = number == MICROBATCHES - 1
        with autocast:
            loss = model(*batch(train)) / MICROBATCHES
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if dist.get_rank() == 0 and step % 20 == 0:
        print(f"step {step}: loss {loss.item() * MICROBATCHES:.2f}")

sync.close_round()  # dtrain
torch.manual_seed(0)
with torch.no_grad(), autocast:
    losses = [model(*batch(validation)).item() for _ in range(10)]
print(f"rank {dist.get_rank()}: validation loss {sum(losses) / len(losses):.4f}")
dist.destroy_process_group()
