"""Newton-Schulz iterations: the nearest semi-orthogonal matrix, roughly, by matrix products alone.

    X_0 = G / |G|_F;   A = X X^T;   X <- a X + (b A + c A A) X        (a, b, c) = (3.4445, -4.7750, 2.0315)

After five steps the singular values of X lie between about 0.7 and 1.2, whatever those of G were, unless they are
smaller than 1e-3 of the largest. Source: Keller Jordan et al., Muon (https://kellerjordan.github.io/posts/muon/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
SMALLEST = 1e-7
BATCH_BYTES = 1 << 28
"""Of the matrices that are orthogonalized in one batch, in fp32."""


def orthogonalized(matrices: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """``matrices`` [..., rows, columns], each made nearly semi-orthogonal; in the dtype that they had.

    ``dtype``: of the iterations; bf16 on GPU and fp32 elsewhere by default. A matrix of zeros stays one, and one that
    is not finite does not become finite.
    """
    if not matrices.numel():
        return matrices.clone()
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)  # squares of large values overflow, those of small ones vanish
    x = x / torch.where(largest > 0, largest, 1.0)
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST)).to(dtype)
    x = x.reshape(-1, *x.shape[-2:])
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    x = x.view(*matrices.shape[:-2], *x.shape[-2:]).to(matrices.dtype)
    return x.mT if tall else x


def orthogonalized_by_shape(
    matrices: Mapping[str, Tensor], steps: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """`orthogonalized` of each, in batches of one shape."""
    by_shape: dict[torch.Size, list[str]] = {}
    for name, matrix in matrices.items():
        by_shape.setdefault(matrix.shape, []).append(name)
    results: dict[str, Tensor] = {}
    for shape, names in by_shape.items():
        for some in _chunks(names, max(1, BATCH_BYTES // (4 * max(1, shape.numel())))):
            results |= zip(some, orthogonalized(torch.stack([matrices[n] for n in some]), steps, dtype), strict=True)
    return {name: results[name] for name in matrices}


def flops(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations of `orthogonalized` for one matrix.

    >>> flops(128, 512, steps=5)
    188743680
    """
    short, long = sorted((rows, columns))
    return steps * (4 * short * short * long + 2 * short**3)


def workspace_bytes(rows: int, columns: int) -> int:
    """Memory that `orthogonalized` takes for one matrix of fp32: three of its size and two of X X^T."""
    short, long = sorted((rows, columns))
    return 4 * (3 * short * long + 2 * short * short)


def _chunks(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]
