"""Cast: exactness, error bounds, bytes, and overflow."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm.compressors.cast import DTYPES, RELATIVE_ERROR, cast
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.ops import payload_bytes
from dtrain.comm.seeds import Key
from tests.comm.zoo import NUMELS, bits, draw, exchange, kinds_of_values, plain, seeds, worlds

KEY = Key(0, 0)
names = st.sampled_from(sorted(DTYPES))


@given(names, st.integers(1, 4), st.sampled_from(NUMELS), seeds)
def test_bytes_and_shapes(name: str, m: int, width: int, seed: int) -> None:
    compressor = cast(name)
    rows = draw(seed, m * width).view(m, width)
    encoded = compressor.encode(rows, KEY)
    assert payload_bytes(encoded) == m * compressor.row_bytes(width)
    assert [(t.shape, t.dtype) for t in encoded] == [((m, width), DTYPES[name])]
    decoded = compressor.decode(encoded, width, KEY)
    assert decoded.shape == (m, width) and decoded.dtype == torch.float32


@given(st.lists(st.floats(width=32), max_size=20))
def test_fp32_is_the_identity(values: list[float]) -> None:
    rows = torch.tensor([values])
    (sent,) = cast("fp32").encode(rows, KEY)
    assert torch.equal(bits(cast("fp32").decode((sent,), len(values), KEY)), bits(rows))


@given(st.sampled_from(["bf16", "fp16"]), st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=50))
def test_the_relative_error_is_the_types(name: str, values: list[float]) -> None:
    rows = torch.tensor([values])
    compressor = cast(name)
    decoded = compressor.decode(compressor.encode(rows, KEY), len(values), KEY).double()
    smallest = torch.finfo(DTYPES[name]).smallest_normal  # below it the spacing no longer shrinks
    allowed = RELATIVE_ERROR[name] * rows.double().abs().clamp(min=smallest)
    assert bool(((decoded - rows.double()).abs() <= allowed).all())
    once_more = compressor.decode(compressor.encode(decoded.float(), KEY), len(values), KEY)
    assert torch.equal(once_more.double(), decoded)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_the_relative_error_is_reached(name: str) -> None:
    half_way = torch.tensor([[1.0 + RELATIVE_ERROR[name]]])
    decoded = cast(name).decode(cast(name).encode(half_way, KEY), 1, KEY)
    assert float((decoded - half_way).abs()) == RELATIVE_ERROR[name]


@given(st.sampled_from(["fp32", "bf16"]), st.sampled_from(NUMELS), kinds_of_values, seeds, st.integers(-30, 30))
def test_the_declared_contraction_holds(name: str, numel: int, kind: str, seed: int, exponent: int) -> None:
    x = draw(seed, numel, kind).unsqueeze(0) * 10.0**exponent
    decoded = cast(name).decode(cast(name).encode(x, KEY), numel, KEY).double()
    allowed = (1 - cast(name).delta) * x.double().square().sum()
    assert float((decoded - x.double()).square().sum()) <= float(allowed)


def test_what_it_declares() -> None:
    assert [cast(name).linear for name in DTYPES] == [True] * 3
    assert [cast(name).unbiased for name in DTYPES] == [True, False, False]
    assert cast("fp32").delta == 1.0 and 0 < cast("bf16").delta < 1
    assert cast("fp16").delta == 0  # below 2^-24 it loses everything
    assert cast() == cast("bf16")
    assert all(isinstance(cast(name), Compressor) for name in DTYPES)


@given(worlds, st.integers(0, 4))
def test_overflow_of_fp16_on_one_rank_is_seen_by_all(world: int, bad: int) -> None:
    values = [{"w": torch.full((7,), 60000.0)} for _ in range(world)]
    assert all(combined.finite for combined in exchange(values, plain(cast("fp16"))))
    values[bad % world]["w"][3] = 70000.0
    assert not any(combined.finite for combined in exchange(values, plain(cast("fp16"))))
    assert all(combined.finite for combined in exchange(values, plain(cast("bf16"))))


@pytest.mark.parametrize("dtype", ["float16", "fp8", "", "FP32"])
def test_an_unknown_type_is_refused(dtype: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"dtype is {dtype!r}; cast knows fp32, fp16, bf16, fp8_e4m3, fp8_e5m2")
    ):
        cast(dtype)
