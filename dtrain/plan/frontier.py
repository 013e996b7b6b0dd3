"""Tensor and pipeline degrees, as the Frontier study arranges them: what they would give. dtrain runs neither.

With t ranks on each layer, p stages, d copies and m microbatches per copy, in bf16 with Adam and ZeRO-1:

    bytes of a rank     (2 + 4 + 12 / d) N / (t p), and of activations one microbatch's share of each of min(p, m)
    bubble              (p - 1) / (m + p - 1) of the time
    tensor parallelism  4 all-reduces of a layer's activations per layer and microbatch, over the link within a node

Sources: Dash et al., arXiv:2312.12705, sections II and IV (tensor degree at most 8, within a node; p / m constant);
Narayanan et al., arXiv:2104.04473, section 2.2 (bubble); Rajbhandari et al., SC 2020, section 5 (ZeRO-1).
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.plan.describe import Description
from dtrain.plan.machine import Machine

TENSOR = (1, 2, 4, 8)


@dataclass(frozen=True)
class Degrees:
    """``copies`` x ``tensor`` x ``pipeline`` ranks. ``bytes``: of one; ``bubble``: share of the time."""

    tensor: int
    pipeline: int
    copies: int
    bytes: int
    bubble: float


def degrees(model: Description, machine: Machine, *, ranks: int, microbatches: int) -> list[Degrees]:
    """What fits, the smallest bubble and then the smallest tensor degree first. ``microbatches``: of the whole step."""
    layers = max(1, sum(1 for layer in model.layers if layer.name))
    found = []
    for tensor in TENSOR:
        for pipeline in (p for p in range(1, layers + 1) if layers % p == 0):
            copies, left = divmod(ranks, tensor * pipeline)
            if left or not copies:
                continue
            own = max(1, microbatches // copies)
            state = (6 + 12 / copies) * model.numel / (tensor * pipeline)
            activations = model.activation_bytes * min(pipeline, own) / (tensor * pipeline)
            size = int(state + activations)
            if size <= machine.usable_bytes:
                found.append(Degrees(tensor, pipeline, copies, size, (pipeline - 1) / (own + pipeline - 1)))
    return sorted(found, key=lambda d: (d.bubble, d.tensor, d.bytes))
