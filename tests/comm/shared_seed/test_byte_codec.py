"""The one-byte code: all 256 bytes, its error, its edges, and the mean of its random rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm.shared_seed.byte_codec import NOTHING, VALUES, decode, encode


def test_every_byte_is_a_fixed_point() -> None:
    for byte in range(256):
        value = decode(byte)
        assert decode(encode(value)) == value
        assert float(np.float32(value)) == value
        if value:
            assert encode(value) == byte
            assert encode(value, 0.0) == encode(value, 0.999) == byte


def test_values_are_quarters_of_powers_of_two() -> None:
    assert VALUES[64] == 1.0 and VALUES[68] == 2.0
    for q in range(1, 128):
        assert VALUES[q] == pytest.approx(2.0 ** ((q - 64) / 4), rel=1e-7)


@given(st.floats(2e-5, 5e4), st.booleans())
def test_the_error_is_nine_percent_at_most(size: float, negative: bool) -> None:
    number = -size if negative else size
    found = decode(encode(number))
    assert math.copysign(1, found) == math.copysign(1, number)
    assert abs(found - number) <= 0.095 * size
    nearest = min(VALUES, key=lambda value: abs(value - size))
    assert abs(abs(found) - size) == pytest.approx(abs(nearest - size), abs=1e-12)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-9, -1e-300])
def test_what_becomes_nothing(number: float) -> None:
    assert encode(number) == NOTHING and decode(encode(number)) == 0.0


@pytest.mark.parametrize("number", [1e6, 1e300])
def test_what_is_too_large_is_the_largest(number: float) -> None:
    assert decode(encode(number)) == VALUES[-1] == -decode(encode(-number))
    assert decode(encode(number, 0.5)) == VALUES[-1]


@pytest.mark.parametrize("number", [3.1, -0.7, 1e-5, 2.0])
def test_random_rounding_is_right_in_the_mean(number: float) -> None:
    draws = (np.arange(4096) + 0.5) / 4096
    mean = np.mean([decode(encode(number, float(u))) for u in draws])
    assert mean == pytest.approx(number, rel=1e-3)
