"""A small decoder-only transformer: RMSNorm, rotary positions, SwiGLU, causal attention, no biases.

Sources: Vaswani et al. 2017 (attention), Zhang and Sennrich 2019 (RMSNorm), Su et al. 2021, section 3.4 (rotary
positions), Shazeer 2020 (SwiGLU), Radford et al. 2019, section 2.3 (residual scaling at initialisation).

Everything the engines need is plain: ``blocks`` is a ``ModuleList`` that FSDP2 shards block by block, there are no
buffers, and the loss and the rotary angles are fp32 whatever the type of the weights, so that the same module runs
under DDP with autocast, FSDP2 with a bf16 ``MixedPrecisionPolicy`` and DeepSpeed with the whole model cast to bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0
INITIAL_STD = 0.02
NORM_EPS = 1e-6  # torch's default is the epsilon of the input's type, which bf16 would make 0.0078
HIDDEN_MULTIPLE = 32


def rotary(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the rotary angles, each fp32 ``[length, head_dim]``.

    Computed where they are used (microseconds), neither kept in buffers nor handed to the blocks: DeepSpeed casts all
    buffers, FSDP2's mixed precision all inputs of a block, and bf16 has 8 bits for a position or a cosine.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), ROTARY_BASE**-half)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs ``(i, i + head_dim / 2)`` of ``x`` ``[..., length, head_dim]`` by their positions, in fp32."""
    low, high = x.chunk(2, dim=-1)
    swapped = torch.cat((high, low), dim=-1)
    return (x * cos + swapped * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention with one matmul for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[examples, length, dim]``; so is the result."""
        examples, length, dim = x.shape
        head_dim = dim // self.heads
        # [3, examples, heads, length, head_dim]: queries and keys are rotated together, as one tensor.
        qkv = self.qkv(x).view(examples, length, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4)
        query, key = rotate(qkv[:2], *rotary(length, head_dim, x.device)).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, qkv[2], is_causal=True)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(examples, length, dim))
        return projected


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, with gate and up in one matmul."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[examples, length, dim]``; so is the result."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        projected: Tensor = self.down(F.silu(gate) * up)
        return projected


class Block(nn.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.attention = Attention(dim, heads)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[examples, length, dim]``; so is the result."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


class Transformer(nn.Module):
    """A causal language model; calling it on a batch gives the mean cross-entropy in nats per token.

    ``hidden=0`` chooses the SwiGLU width: 8/3 of ``dim``, rounded up to a multiple of 32. Parameters are drawn from
    torch's global generator, so ``torch.manual_seed`` fixes them. Raises ``ValueError`` for sizes that do not fit.

    >>> _ = torch.manual_seed(0)
    >>> model = Transformer(vocab_size=256, dim=32, layers=2, heads=4, max_length=16)
    >>> tokens = torch.arange(16).view(1, 16)
    >>> model({"input": tokens, "target": tokens + 1}).shape
    torch.Size([])
    >>> model.logits(tokens).shape
    torch.Size([1, 16, 256])
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        layers: int,
        heads: int,
        hidden: int = 0,
        max_length: int,
        tied_embeddings: bool = False,
    ) -> None:
        super().__init__()
        _check(vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, max_length=max_length)
        if hidden < 0:
            raise ValueError(f"hidden is {hidden}; give a width, or 0 for about 8/3 of dim")
        hidden = hidden or -(-8 * dim // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE
        self.max_length = max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.head = None if tied_embeddings else nn.Linear(dim, vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal(0, 0.02); what writes into the residual stream is divided by the root of the number of writers."""
        residual_std = INITIAL_STD / (2 * len(self.blocks)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # the gains of the norms stay 1
            writes = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            nn.init.normal_(parameter, std=residual_std if writes else INITIAL_STD)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token: int64 ``[examples, length]`` to ``[examples, length, vocab_size]``."""
        length = tokens.shape[-1]
        if length > self.max_length:
            raise ValueError(f"tokens has length {length}, the model was built for max_length={self.max_length}")
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        # A tied model has one parameter under one name: checkpoints and flat shards never see it twice.
        scores: Tensor = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return scores

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy (nats per token, fp32 scalar) of ``{"input", "target"}``, int64 ``[examples, length]``."""
        scores = self.logits(batch["input"])
        return F.cross_entropy(scores.flatten(0, -2).float(), batch["target"].flatten())


def _check(*, vocab_size: int, dim: int, layers: int, heads: int, max_length: int) -> None:
    sizes = {"vocab_size": vocab_size, "dim": dim, "layers": layers, "heads": heads, "max_length": max_length}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if dim % (2 * heads):
        raise ValueError(
            f"dim={dim} does not divide into {heads} heads of even width (rotary positions turn pairs); "
            f"dim={-(-dim // (2 * heads)) * 2 * heads} would"
        )
