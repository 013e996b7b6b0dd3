"""What the programs of tests and benchmarks learn: a small regression, or the text that dtrain trains on by default."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dtrain.train.data.order import example_at
from dtrain.train.data.text import ByteText
from dtrain.train.models.transformer import Transformer

INPUTS = 8


def network(*hidden: int) -> nn.Sequential:
    """Always with the same first weights."""
    torch.manual_seed(0)
    widths = (INPUTS, *hidden)
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


def sine(x: Tensor) -> Tensor:
    """A target, [n] of [n, 8]."""
    return torch.sin(x @ torch.linspace(-1, 1, INPUTS))


def total(x: Tensor) -> Tensor:
    """A target, [n] of [n, 8]."""
    return x.sum(1)


def squared_error(
    model: Callable[[Tensor], Tensor], step: int, place: int, target: Callable[[Tensor], Tensor] = sine
) -> Tensor:
    """The loss of a `network` on the batch that ``place`` has at ``step``."""
    x = torch.randn(16, INPUTS, generator=torch.Generator().manual_seed(1000 * step + place))
    return (model(x).squeeze() - target(x)).square().mean()


def transformer(dim: int, layers: int, heads: int, *, block: int, seed: int = 0) -> Transformer:
    """For bytes in blocks of ``block``."""
    torch.manual_seed(seed)
    return Transformer(dim=dim, layers=layers, heads=heads, vocab_size=256, max_length=block)


def text_batch(text: ByteText, seed: int, first: int, count: int) -> Mapping[str, Tensor]:
    """``count`` examples from position ``first`` in the order of ``seed``."""
    return stacked([text[example_at(seed, first + number, len(text))] for number in range(count)])


def stacked(examples: list[dict[str, Tensor]]) -> Mapping[str, Tensor]:
    """One batch of examples."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
