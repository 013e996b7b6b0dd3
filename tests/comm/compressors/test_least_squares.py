"""Quantization by least squares: the scale that loses least, the contraction, and what it must not let through."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.compressors.quantize import LeastSquares, quantize
from dtrain.comm.seeds import Key
from dtrain.compress import error_feedback, sign
from tests.comm.zoo import NUMELS, VALUES, draw, kinds_of_values, seeds

KEY = Key(seed=1, step=2, rank=3, fqn="w", phase="send")
BITS = (1, 2, 3, 4)


def least_squares(bits: int, block: int = 64) -> LeastSquares:
    made = quantize("least_squares", bits=bits, block=block)
    assert isinstance(made, LeastSquares)
    return made


def round_trip(compressor: LeastSquares, rows: Tensor) -> Tensor:
    return compressor.decode(compressor.encode(rows, KEY), rows.shape[1], KEY.shared)


def left(compressor: LeastSquares, rows: Tensor) -> float:
    """The part of the squared norm that is lost."""
    exact = rows.double()
    return float((round_trip(compressor, rows).double() - exact).square().sum() / exact.square().sum())


def least(rows: Tensor, bits: int) -> float:
    """As `left`, of each row one block, over a dense grid of scales with the nearest levels and the best factor."""
    exact, half, best = rows.double(), 2 ** (bits - 1), torch.zeros(rows.shape[0], dtype=torch.float64)
    for part in torch.linspace(0.01, 1.2, 600):
        scale = 2 * part * exact.abs().amax(1, keepdim=True) / (2**bits - 1)
        levels = (exact / scale).floor().clamp(-half, half - 1) + 0.5
        best = torch.maximum(best, (exact * levels).sum(1) ** 2 / levels.square().sum(1))
    return float((exact.square().sum() - best.sum()) / exact.square().sum())


def laplace(m: int, n: int) -> Tensor:
    uniform = torch.rand(m, n, generator=torch.Generator().manual_seed(5)).clamp(min=1e-6)
    return -uniform.log() * torch.randn(m, n, generator=torch.Generator().manual_seed(6)).sign()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "laplace", "heavy", "one in ten"])
def test_what_is_lost_is_next_to_the_least_there_is(bits: int, kind: str) -> None:
    normal = torch.stack([draw(row, 256) for row in range(100)])
    rows = {
        "normal": normal,
        "laplace": laplace(100, 256),
        "heavy": torch.stack([draw(row, 256, "heavy") for row in range(100)]),
        "one in ten": normal * (torch.rand(100, 256, generator=torch.Generator().manual_seed(1)) < 0.1),
    }[kind]
    assert left(least_squares(bits, 256), rows) <= 1.03 * least(rows, bits)


@pytest.mark.parametrize(("bits", "loss"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_normal_values_lose_what_the_best_uniform_quantizer_loses(bits: int, loss: float) -> None:
    """Max, Quantizing for minimum distortion (1960), table II; a block of its own scale may lose a little less."""
    assert left(least_squares(bits, 4096), draw(1, 1 << 18).view(1, -1)) == pytest.approx(loss, rel=0.04)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [1, 2, 16, 256, 4096])
def test_one_element_that_is_not_zero_takes_the_contraction_to_its_bound(bits: int, block: int) -> None:
    compressor = least_squares(bits, block)
    rows = torch.zeros(1, block)
    rows[0, block // 2] = -3.7
    assert compressor.delta > 0
    assert left(compressor, rows) == pytest.approx(1 - compressor.delta, rel=1e-4, abs=2**-14)


@given(st.sampled_from(BITS), st.sampled_from([1, 3, 16, 64, 512]), st.sampled_from(NUMELS), kinds_of_values, seeds)
@settings(max_examples=150)
def test_the_declared_contraction_holds(bits: int, block: int, width: int, kind: str, seed: int) -> None:
    compressor, rows = least_squares(bits, block), draw(seed, width, kind).view(1, -1)
    exact = rows.double()
    error = (round_trip(compressor, rows).double() - exact).square().sum()
    assert float(error) <= (1 - compressor.delta) * float(exact.square().sum()) * (1 + 1e-9)


@given(
    st.sampled_from(BITS),
    st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.499, 0.335, 0.34, 1e-3, 2 / 3, 0.25, -0.125]), min_size=1, max_size=40
    ),
)
@settings(max_examples=300)
def test_the_declared_contraction_holds_on_the_edges_between_levels(bits: int, values: list[float]) -> None:
    compressor, rows = least_squares(bits, len(values)), torch.tensor([values])
    exact = rows.double()
    error = (round_trip(compressor, rows).double() - exact).square().sum()
    assert float(error) <= (1 - compressor.delta) * float(exact.square().sum()) * (1 + 1e-9)


def test_one_bit_is_sign() -> None:
    rows = torch.stack([draw(row, 200) for row in range(3)])
    signs = sign(block=64)
    expected = signs.decode(signs.encode(rows, KEY), 200, KEY)
    torch.testing.assert_close(round_trip(least_squares(1), rows), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_the_levels_are_halves_of_odd_scales(bits: int) -> None:
    compressor = least_squares(bits, 128)
    rows = draw(3, 128).view(1, -1)
    packed, scale = compressor.encode(rows, KEY)
    assert scale.dtype == torch.bfloat16 and packed.shape == (1, 16 * bits)
    levels = round_trip(compressor, rows) / scale.float()
    assert set(levels.flatten().tolist()) <= {k + 0.5 for k in range(-compressor.levels, compressor.levels)}
    assert bool(((levels > 0) == (rows >= 0)).all())  # clipped, but never over zero


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_block_beside_others_stays_zero(bits: int) -> None:
    rows = torch.cat([torch.zeros(2, 64), torch.stack([draw(1, 64), draw(2, 64)]), torch.zeros(2, 30)], dim=1)
    decoded = round_trip(least_squares(bits), rows)
    assert not decoded[:, :64].any() and not decoded[:, 128:].any() and bool(decoded[:, 64:128].all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_block(bits: int, bad: float) -> None:
    rows = torch.stack([draw(1, 200), draw(2, 200)])
    rows[1, 70] = bad
    decoded = round_trip(least_squares(bits), rows)
    assert not decoded[1, 64:128].isfinite().any()
    assert bool(decoded[0].isfinite().all()) and bool(decoded[1, :64].isfinite().all())
    assert bool(decoded[1, 128:].isfinite().all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e37])
def test_values_near_the_ends_of_fp32_lose_no_more_than_others(bits: int, scale: float) -> None:
    for kind in VALUES:
        rows = draw(7, 256, kind).view(1, -1).clamp(-5, 5)
        if rows.any():
            assert left(least_squares(bits), rows * scale) == pytest.approx(
                left(least_squares(bits), rows), rel=0.05, abs=2**-15
            )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-39])
def test_denormal_values_do_not_grow(bits: int, scale: float) -> None:
    rows = (draw(3, 256).clamp(-3, 3) * scale).view(1, -1)
    decoded = round_trip(least_squares(bits), rows)
    assert bool(decoded.isfinite().all()) and float(decoded.abs().max()) <= 2 * float(rows.abs().max())


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_fp32_come_back_right_or_not_finite(bits: int) -> None:
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor([[largest, -largest] * 8, [largest, *[1.0] * 15]])
    decoded = round_trip(least_squares(bits, 16), rows)
    assert not decoded.isnan().any()
    assert bool((~decoded.isfinite() | (decoded.sign() == rows.sign())).all())


def test_a_plan_may_choose_its_bits() -> None:
    assert [one.bits for one in least_squares(2).alternatives()] == [1, 2, 3, 4]
    losses = [left(one, draw(1, 4096).view(1, -1)) for one in least_squares(2).alternatives()]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits is 0; a least_squares code has 1 to 4 bits"),
        ({"bits": 5}, "bits is 5; a least_squares code has 1 to 4 bits (for more use symmetric)"),
        ({"bits": True}, "bits is True; a least_squares code has 1 to 4 bits"),
        ({"bits": 2.0}, "bits is 2.0; a least_squares code has 1 to 4 bits"),
        ({"block": 0}, "block is 0; give a positive number"),
        ({"rounding": "stochastic"}, "least_squares clips its largest values, so that no rounding makes it unbiased"),
        ({"rounding": "up"}, "rounding is 'up'; choose one of nearest, stochastic"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize("least_squares", **arguments)  # type: ignore[arg-type]


def test_feedback_takes_it_with_any_block() -> None:
    assert quantize("least_squares") == LeastSquares(2, 512, "nearest")
    for bits in BITS:
        assert error_feedback(quantize("least_squares", bits=bits, block=1 << 16)).feedback.feeds_back
