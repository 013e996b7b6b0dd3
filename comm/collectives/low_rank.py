"""PowerSGD's collective: a step of power iteration over all peers, in two rounds of means (see `TwoRoundCompressor`).

    P = mean_i M_i Q;   B = basis(P);   R = mean_i B^T M_i;   result B R        M_i [rows, columns] of peer i

Bytes: those of two dense means, of rank (rows + columns) numbers for each matrix. All matrices of a message go through
each round at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.compressors.compressor import TwoRoundCompressor
from dtrain.comm.feedback import Feedback
from dtrain.comm.layout import Matrix, Named, is_finite, is_keepable
from dtrain.comm.ops import Flow
from dtrain.comm.seeds import Key
from dtrain.comm.state import State

DenseMean: TypeAlias = Callable[[Named, bool], Flow[Combined]]
"""The mean over the peers of flat values, in full precision; the second argument: whether they may be used."""


def low_rank_mean(
    values: Named,
    compressors: Mapping[str, TwoRoundCompressor],
    feedbacks: Mapping[str, Feedback],
    matrices: Mapping[str, Matrix],
    dense_mean: DenseMean,
    key: Key,
    state: State,
    *,
    counts: bool = True,
) -> Flow[Combined]:
    """The mean of flat ``values`` [n], each a matrix as ``matrices`` says. New state is staged in ``state``.

    ``counts``: False for a rank of weight 0, whose values are left out.
    """
    usable = is_keepable(*values.values())
    counts = counts and usable
    if counts:
        corrected = {fqn: feedbacks[fqn].correct(fqn, value, state) for fqn, value in values.items()}
        usable = is_finite(*corrected.values())
    else:
        corrected = {fqn: torch.zeros_like(value) for fqn, value in values.items()}
    views = {fqn: matrices[fqn].view(value) for fqn, value in corrected.items()}
    starts = {
        fqn: compressors[fqn].start(matrices[fqn], replace(key, fqn=fqn), state, matrix)
        for fqn, matrix in views.items()
    }
    # Thin matrices come first in products, transposed: CPUs take four times as long with a thin one last.
    first = {fqn: (starts[fqn].T @ matrix.T).reshape(-1) for fqn, matrix in views.items()}
    means = yield from dense_mean(first, usable)
    bases = {
        fqn: compressors[fqn].basis(mean.view(compressors[fqn].rank, views[fqn].shape[0]).T)
        for fqn, mean in means.values.items()
    }
    second = {fqn: bases[fqn].T @ matrix for fqn, matrix in views.items()}  # B^T M_i [rank, columns]
    factors = yield from dense_mean({fqn: factor.reshape(-1) for fqn, factor in second.items()}, usable)
    results: dict[str, Tensor] = {}
    for fqn, value in values.items():
        feedback, matrix, factor = feedbacks[fqn], matrices[fqn], factors.values[fqn].view(second[fqn].shape)
        if not counts:
            feedback.carry_over(fqn, value, state)
        elif feedback.kinds:
            feedback.retain_product(fqn, value, corrected[fqn], matrix, (bases[fqn], second[fqn]), state)
        compressors[fqn].keep(fqn, factor, starts[fqn], state)
        results[fqn] = feedback.result(fqn, matrix.flat(bases[fqn] @ factor), state)
    return Combined(results, means.finite and factors.finite, means.present)
