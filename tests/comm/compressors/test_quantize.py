"""Max-min quantization: bytes, error bounds, unbiasedness, contraction, and what it must not touch."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.compressors.quantize import Quantize, quantize
from dtrain.comm.kernels import pack_bits, pack_blocks, packed_bytes, unpack_bits, unpack_blocks
from dtrain.comm.ops import payload_bytes
from dtrain.comm.seeds import Key
from tests.comm.zoo import NUMELS, VALUES, draw, kinds_of_values, same, seeds

EPS = torch.finfo(torch.float32).eps
KEY = Key(seed=1, step=2, rank=3, fqn="w", phase="send")

bits_of_a_code = st.integers(2, 8)
blocks = st.sampled_from([1, 2, 3, 7, 16, 64, 512])
widths = st.sampled_from(NUMELS)
roundings = st.sampled_from(["nearest", "stochastic"])


def rows_of(seed: int, m: int, width: int, kind: str = "normal") -> Tensor:
    return torch.stack([draw(100 * seed + row, width, kind) for row in range(m)])


def round_trip(compressor: Compressor, rows: Tensor, key: Key = KEY) -> Tensor:
    return compressor.decode(compressor.encode(rows, key), rows.shape[1], key.shared)


def ranges(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Each element's block minimum and maximum, [m, width] each, in fp64."""
    low, high = torch.empty_like(rows, dtype=torch.float64), torch.empty_like(rows, dtype=torch.float64)
    for start in range(0, rows.shape[1], block):
        part = rows[:, start : start + block].double()
        low[:, start : start + block] = part.amin(1, keepdim=True)
        high[:, start : start + block] = part.amax(1, keepdim=True)
    return low, high


# --- bytes ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 70), seeds)
def test_packed_codes_come_back(bits: int, m: int, width: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (m, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (m, -(-width * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, width), codes)


@given(st.integers(1, 8), st.sampled_from([1, 3, 4, 8, 16]), st.integers(1, 4), st.integers(0, 70), seeds)
def test_blocks_packed_one_by_one_come_back_and_each_begins_at_a_byte(
    bits: int, block: int, m: int, width: int, seed: int
) -> None:
    codes = torch.randint(0, 2**bits, (m, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_blocks(codes, bits, block)
    assert packed.dtype == torch.uint8 and packed.shape == (m, packed_bytes(width, bits, block))
    parts = [pack_bits(part, bits) for part in codes.split(block, dim=1)]
    assert torch.equal(packed, torch.cat(parts, dim=1))
    assert torch.equal(unpack_blocks(packed, bits, block, width), codes)


@pytest.mark.parametrize(("bits", "first"), [(1, [1, 0, 1, 0]), (2, [1, 2, 3, 0]), (4, [1, 2])])
def test_parts_of_the_row_lie_over_one_another(bits: int, first: list[int]) -> None:
    """The wire format of widths that divide 8: byte j holds the j-th code of each part, the first part lowest."""
    codes = [(number + 1) % 2**bits for number in range(11)]
    part = -(-11 * bits // 8)
    places = range(0, 8, bits)
    wanted = [
        sum((codes[j + n * part] if j + n * part < 11 else 0) << at for n, at in enumerate(places)) for j in range(part)
    ]
    assert codes[: len(first)] == first
    assert pack_bits(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [wanted]


@pytest.mark.parametrize("bits", [3, 5, 6, 7, 8])
def test_the_first_code_is_the_lowest(bits: int) -> None:
    """The wire format, once in full: codes 1, 2, 3, ... as one little-endian number."""
    codes = [(number + 1) % 2**bits for number in range(11)]
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    wanted = list(number.to_bytes(-(-11 * bits // 8), "little"))
    assert pack_bits(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [wanted]


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_rows_are_no_bytes(bits: int) -> None:
    codes = torch.zeros(0, 5, dtype=torch.uint8)
    assert unpack_bits(pack_bits(codes, bits), bits, 5).shape == (0, 5)


@given(bits_of_a_code, blocks, roundings, st.integers(1, 5), widths, seeds)
@settings(max_examples=40)
def test_the_declared_bytes_are_those_of_the_payload(
    bits: int, block: int, rounding: str, m: int, width: int, seed: int
) -> None:
    compressor = quantize(bits=bits, block=block, rounding=rounding)
    encoded = compressor.encode(rows_of(seed, m, width), KEY)
    assert payload_bytes(encoded) == m * compressor.row_bytes(width)
    assert all(tensor.shape[0] == m for tensor in encoded)
    other = compressor.encode(rows_of(seed + 1, m, width, "zeros"), KEY)
    assert [(t.shape, t.dtype) for t in encoded] == [(t.shape, t.dtype) for t in other]
    decoded = compressor.decode(encoded, width, KEY)
    assert decoded.shape == (m, width) and decoded.dtype == torch.float32


# --- errors --------------------------------------------------------------------------------------------------------


@given(bits_of_a_code, blocks, roundings, widths, kinds_of_values, seeds, st.integers(-20, 30))
@settings(max_examples=60)
def test_an_element_errs_by_half_a_unit_or_by_one(
    bits: int, block: int, rounding: str, width: int, kind: str, seed: int, exponent: int
) -> None:
    compressor = quantize(bits=bits, block=block, rounding=rounding)
    rows = rows_of(seed, 2, width, kind) * 10.0**exponent
    low, high = ranges(rows, block)
    unit = (high - low) / compressor.levels
    round_off = 4 * EPS * torch.maximum(low.abs(), high.abs())
    error = (round_trip(compressor, rows).double() - rows.double()).abs()
    assert bool((error <= unit * (0.5 if rounding == "nearest" else 1.0) + round_off).all())
    # The ends of each block's range are on its grid.
    ends = (rows.double() == low) | (rows.double() == high)
    assert bool((error[ends] <= round_off[ends]).all())


@given(bits_of_a_code, blocks, roundings, widths, st.floats(-(2.0**127), 2.0**127, width=32))
def test_constant_blocks_are_exact(bits: int, block: int, rounding: str, width: int, value: float) -> None:
    compressor = quantize(bits=bits, block=block, rounding=rounding)
    rows = torch.full((3, width), value)
    assert torch.equal(round_trip(compressor, rows), rows)
    # A zero block beside one that is not zero.
    rows = torch.cat([torch.zeros(3, block), rows_of(1, 3, block)], dim=1)
    assert torch.equal(round_trip(compressor, rows)[:, :block], torch.zeros(3, block))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-39, 1.2e-38, 1e-30, 1e30, 1e37, 3e37])
def test_denormal_and_huge_values_stay_finite(bits: int, scale: float, rounding: str) -> None:
    for kind in VALUES:
        rows = rows_of(5, 2, 61, kind)
        rows = (rows / rows.abs().max().clamp(min=1) * 5 * scale).to(torch.float32)
        decoded = round_trip(quantize(bits=bits, block=16, rounding=rounding), rows)
        assert bool(decoded.isfinite().all())
        assert bool(decoded.abs().max() <= rows.abs().max() * 1.001 + 1e-42)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_range_beyond_what_a_float_holds_is_right_or_not_finite(bits: int) -> None:
    """Such a step is skipped, since routes look at what was decoded; it must never pass as small numbers."""
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor([[-largest, largest, 0.0, 1e38], [3e38, -3e38, 2e38, -1e38], [largest, largest, 0.0, 1.0]])
    decoded = round_trip(quantize(bits=bits), rows).double()
    low, high = ranges(rows, 512)
    near = (decoded - rows.double()).abs() <= 0.5 * (high - low) / (2**bits - 1) + 4 * EPS * largest
    assert bool((near | ~decoded.isfinite()).all()) and not bool(decoded.isnan().any())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 7, 60])
def test_a_value_that_is_not_finite_does_not_come_back_as_one_that_is(bad: float, place: int) -> None:
    rows = rows_of(3, 2, 61)
    rows[1, place] = bad
    decoded = round_trip(quantize(bits=8, block=16), rows)
    assert not bool(decoded[1, place].isfinite())
    assert bool(decoded[0].isfinite().all())


# --- expectations --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased_and_no_noisier_than_declared(bits: int) -> None:
    compressor, draws = quantize(bits=bits, block=32, rounding="stochastic"), 1200
    assert compressor.unbiased and not quantize(bits=bits).unbiased
    x = draw(1, 61).unsqueeze(0)
    decoded = torch.cat([round_trip(compressor, x, Key(seed=0, step=step)) for step in range(draws)]).double()
    error = decoded - x.double()
    low, high = ranges(x, 32)
    unit = (high - low) / compressor.levels
    assert bool((error.square().mean(0) <= 1.1 * unit[0].square() / 4 + EPS).all())
    # The z-scores of 61 unbiased means: none beyond 5. A bias of half a unit would be about 60.
    z = error.mean(0) / (error.std(0) + 4 * EPS * high[0].abs()).clamp(min=1e-12) * draws**0.5
    moved = error.std(0) > 1e-3 * unit[0]
    assert int(moved.sum()) > 50
    assert float(z[moved].abs().max()) < 5
    assert 0.5 < float(z[moved].std()) < 1.6


@given(bits_of_a_code, blocks, st.integers(1, 4), widths, seeds)
@settings(max_examples=30)
def test_what_is_drawn_depends_on_the_key_alone(bits: int, block: int, m: int, width: int, seed: int) -> None:
    compressor = quantize(bits=bits, block=block, rounding="stochastic")
    rows = rows_of(seed, m, width)
    before = torch.get_rng_state()
    first = compressor.encode(rows, Key(seed, 1))
    assert torch.equal(torch.get_rng_state(), before)
    compressor.encode(rows, Key(seed, 2))
    torch.rand(7)
    assert same(compressor.encode(rows.clone(), Key(seed, 1)), first)


def test_other_keys_draw_otherwise() -> None:
    compressor, rows = quantize(bits=4, rounding="stochastic"), rows_of(1, 2, 200)
    keys = [Key(1, 1), Key(2, 1), Key(1, 2), Key(1, 1, 0), Key(1, 1, 1), Key(1, 1, fqn="w"), Key(1, 1, phase="send")]
    codes = {tuple(compressor.encode(rows, key)[0].flatten().tolist()) for key in keys}
    assert len(codes) == len(keys)
    nearest = quantize(bits=4)
    assert same(nearest.encode(rows, keys[0]), nearest.encode(rows, keys[1]))


def adversaries(block: int, levels: int) -> dict[str, Tensor]:
    """Rows that take a block's error to its bound: most elements lie half-way between two codes."""
    half = torch.full((block,), 0.5 / levels)  # the grid from 0 to 1 has unit 1 / levels
    half[-1:] = 1.0
    centred = torch.full((block,), 0.0)  # levels is odd, so 0 is half-way on the grid from -1 to 1
    centred[:1], centred[-1:] = -1.0, 1.0
    tails = draw(3, block, "heavy")
    return {
        "many half units under one large": half,
        "zeros between two large ones": centred,
        "small values between two large ones": draw(0, block, "two large"),
        "one-sparse": torch.eye(1, block)[0],
        "constant": torch.full((block,), -0.7),
        "offset": 1.0 + 1e-3 * draw(1, block),
        "heavy tail": tails,
        "zero": torch.zeros(block),
        "normal": draw(2, block),
        "huge": 1e38 * draw(2, block).clamp(-1, 1),
        "tiny": 1e-30 * draw(2, block),
    }


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("bits", "block"), [(8, 512), (8, 16), (5, 64), (4, 256), (3, 7), (3, 64), (2, 16), (2, 1)])
def test_the_declared_contraction_holds_for_every_input(bits: int, block: int, rounding: str) -> None:
    compressor = quantize(bits=bits, block=block, rounding=rounding)
    draws = 1 if rounding == "nearest" else 25
    worst = 0.0
    for name, x in adversaries(block, compressor.levels).items():
        exact = x.double()
        errors = [
            (round_trip(compressor, x.unsqueeze(0), Key(0, step))[0].double() - exact).square().sum()
            for step in range(draws)
        ]
        allowed = (1 - compressor.delta) * exact.square().sum()
        spread = 1.0 if draws == 1 else 1.3  # the bound is on the expectation
        assert float(torch.stack(errors).mean()) <= spread * float(allowed) * (1 + 1e-4) + 1e-12 * float(
            exact.square().sum()
        ), name
        worst = max(worst, float(torch.stack(errors).mean() / allowed.clamp(min=1e-300)))
    if rounding == "nearest" and block >= 16:
        assert worst > 0.8  # the bound is not loose: somebody reaches it


@given(bits_of_a_code, blocks, roundings, widths, kinds_of_values, seeds)
@settings(max_examples=40)
def test_the_declared_contraction_holds_over_whole_rows(
    bits: int, block: int, rounding: str, width: int, kind: str, seed: int
) -> None:
    compressor = quantize(bits=bits, block=block, rounding=rounding)
    x = rows_of(seed, 1, width, kind)
    error = (round_trip(compressor, x).double() - x.double()).square().sum()
    # One draw may err by a whole unit where its expectation is bounded by half of one.
    slack = 1.0 if rounding == "nearest" else 4.0
    allowed = slack * (1 - compressor.delta) * x.double().square().sum()
    assert float(error) <= float(allowed) * (1 + 1e-4) + 1e-12 * float(x.double().square().sum())


# --- rows ----------------------------------------------------------------------------------------------------------


@given(bits_of_a_code, blocks, st.integers(1, 5), widths, kinds_of_values, seeds)
@settings(max_examples=40)
def test_rows_encoded_together_are_rows_encoded_alone(
    bits: int, block: int, m: int, width: int, kind: str, seed: int
) -> None:
    compressor, rows = quantize(bits=bits, block=block), rows_of(seed, m, width, kind)
    untouched = rows.clone()
    together = compressor.encode(rows, KEY)
    assert torch.equal(rows, untouched)
    for row in range(m):
        alone = compressor.encode(rows[row : row + 1], KEY)
        assert same(alone, tuple(tensor[row : row + 1] for tensor in together))


@given(roundings, bits_of_a_code, st.integers(1, 5), widths, seeds)
@settings(max_examples=30)
def test_a_row_is_decoded_from_its_own_part_of_the_payload(
    rounding: str, bits: int, m: int, width: int, seed: int
) -> None:
    compressor, rows = quantize(bits=bits, block=16, rounding=rounding), rows_of(seed, m, width)
    encoded = compressor.encode(rows, KEY)
    decoded = compressor.decode(encoded, width, KEY)
    for row in range(m):
        alone = compressor.decode(tuple(tensor[row : row + 1] for tensor in encoded), width, KEY)
        assert torch.equal(alone[0], decoded[row])


# --- construction --------------------------------------------------------------------------------------------------


def test_what_it_declares() -> None:
    compressor = quantize()
    assert compressor == Quantize(bits=8, block=512, rounding="nearest")
    assert isinstance(compressor, Compressor)
    assert not compressor.linear
    assert compressor.delta == 1 - 512 / (2 * 255**2)
    assert quantize(bits=4, block=512).delta < 0 < quantize(bits=4, block=256).delta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits is 1; a code has 2 to 8 bits (for 1 bit use sign(), or"),
        ({"bits": 9}, "bits is 9; a code has 2 to 8 bits"),
        ({"bits": 4.0}, "bits is 4.0; a code has 2 to 8 bits"),
        ({"bits": "8"}, "bits is '8'; a code has 2 to 8 bits"),
        ({"block": 0}, "block is 0; give a positive number of elements, for example 512"),
        ({"block": -3}, "block is -3; give a positive number"),
        ({"block": 2.5}, "block is 2.5; give a positive number"),
        ({"rounding": "up"}, "rounding is 'up'; choose one of nearest, stochastic"),
        ({"rounding": ""}, "rounding is ''; choose one of nearest, stochastic"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_has_twice_the_squared_error(bits: int) -> None:
    rows, errors = draw(1, 1 << 16)[None], []
    for rounding in ("nearest", "stochastic"):
        coder = quantize(bits=bits, rounding=rounding)
        decoded = coder.decode(coder.encode(rows, KEY), rows.shape[1], KEY.shared)
        errors.append(float((decoded - rows).double().square().sum()))
    assert errors[1] / errors[0] == pytest.approx(2.0, rel=0.02)
