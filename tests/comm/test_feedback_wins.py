"""Where theory says that feedback wins, it does: quadratics of workers that pull in different directions.

    f_i(x) = |A_i (x - b_i)|^2 / 2,     minimize mean_i f_i by gradient descent on compressed gradients

At the optimum the workers' gradients are not zero, only their mean is. A biased compressor without feedback then moves
on in some direction for ever; EF14 stays near the optimum as far as its step is small, EF21 gets there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import AnyCompressor
from dtrain.comm.feedback import Compression, as_compression
from dtrain.compress import cast, compeft, ef21, error_feedback, powersgd, quantize, randk, sign, topk
from tests.comm.zoo import exchange, fresh_states

WORLD, ROWS, COLUMNS, STEPS = 3, 24, 16, 250
DIM = ROWS * COLUMNS

BIASED: dict[str, AnyCompressor] = {
    "top-k": topk(0.1),
    "random-k": randk(0.1),
    "sign": sign(block=96),
    "compeft": compeft(block=96, density=0.2),
    "int2": quantize(bits=2, block=12),
    "PowerSGD": powersgd(2),
}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Curvatures [WORLD, DIM], centres [WORLD, DIM], and the optimum [DIM]."""
    generator = torch.Generator().manual_seed(0)
    curvatures = 0.2 + torch.rand(WORLD, DIM, generator=generator, dtype=torch.float64)
    centres = 5 * torch.randn(WORLD, DIM, generator=generator, dtype=torch.float64)
    return curvatures, centres, (curvatures * centres).sum(0) / curvatures.sum(0)


def distance(compression: Compression, lr: float = 0.05) -> float:
    """To the optimum after STEPS, in units of the first distance; the mean over the last 20 steps."""
    curvatures, centres, optimum = problem()
    x = torch.zeros(DIM, dtype=torch.float64)
    states, off = fresh_states(compression, WORLD), []
    for step in range(STEPS):
        gradients = [{"w": curvatures[rank] * (x - centres[rank])} for rank in range(WORLD)]
        found = exchange(gradients, compression, states, step=step)[0]
        for state in states:
            state.commit()
        x = x - lr * found.values["w"]
        off.append(float((x - optimum).norm()))
    return sum(off[-20:]) / 20 / float(optimum.norm())


@functools.cache
def distance_without(name: str) -> float:
    return distance(as_compression(BIASED[name]))


FEEDBACKS: dict[str, Callable[[AnyCompressor], Compression]] = {
    "EF14": error_feedback,
    "EF21": lambda compressor: ef21(compressor, eta=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("name", BIASED)
def test_feedback_gets_closer_to_the_optimum_than_none(name: str, feedback: str) -> None:
    without = distance_without(name)
    with_it = distance(FEEDBACKS[feedback](BIASED[name]))
    assert with_it < 0.5 * without, f"{without:.4f} -> {with_it:.4f}"


def test_what_loses_nothing_needs_none() -> None:
    assert distance(as_compression(cast("fp32"))) < 0.01
