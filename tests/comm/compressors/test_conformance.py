"""Every compressor keeps what it declares; and compressors that do not are caught."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.compressors.quantize import Quantize
from dtrain.comm.compressors.sign import Sign
from dtrain.comm.compressors.sparse import SAMPLED_FROM, TopK, kept, largest, packed_indices, unpacked_indices
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key
from dtrain.compress import cast, compeft, error_feedback, powersgd, quantize, randk, sign, terngrad, topk
from dtrain.testing import check_compressor
from tests.comm.zoo import COMPRESSORS, seeds

KEY = Key(0, 0, 1, "w", "send")


def slow_if_drawn(name: str) -> list[pytest.MarkDecorator]:
    """The mean of an unbiased compressor is that of many draws."""
    return [pytest.mark.slow] if COMPRESSORS[name].unbiased else []


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if_drawn(name)) for name in COMPRESSORS])
def test_it_keeps_what_it_declares(name: str) -> None:
    check_compressor(COMPRESSORS[name])


class NormScaled(Sign):
    """DeepSpeed's factor: |x|_2 / sqrt(n) for the signs. No contraction."""

    def encode(self, rows: Tensor, key: Key) -> Payload:
        packed, scale = super().encode(rows, key)
        return packed, torch.full_like(scale, float(rows.norm()) / max(rows.numel(), 1) ** 0.5)


class Forgetful(Sign):
    """Calls the global generator."""

    def encode(self, rows: Tensor, key: Key) -> Payload:
        torch.rand(1)
        return super().encode(rows, key)


class Boastful(Sign):
    """Says that it is unbiased."""

    @property
    def unbiased(self) -> bool:
        return True


class TooSmall(Sign):
    """Forgets the scales in its count of bytes."""

    def row_bytes(self, width: int) -> int:
        return -(-width // 8)


class Summed(Sign):
    """Says that codes may be summed."""

    @property
    def linear(self) -> bool:
        return True


class Together(TopK):
    """Decodes rows that depend on one another."""

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        rows = super().decode(payload, width, key)
        return rows - rows.mean(0) if rows.shape[0] > 1 else rows


@dataclass(frozen=True)
class Fixed:
    """One grid for all blocks: says that it is homogeneous."""

    unbiased = False
    delta = 0.0
    homogeneous = True
    linear = False

    def encode(self, rows: Tensor, key: Key) -> Payload:
        return (rows.clamp(-3, 3),)

    def decode(self, payload: Payload, width: int, key: Key) -> Tensor:
        return payload[0]

    def row_bytes(self, width: int) -> int:
        return 4 * width


class Coarse(Fixed):
    """Rounds to whole multiples of a power of two: homogeneous for those factors alone."""

    def encode(self, rows: Tensor, key: Key) -> Payload:
        largest = rows.abs().amax(1, keepdim=True) if rows.numel() else rows
        unit = torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1e-30) / 127)))
        return ((rows / unit).round() * unit,)


class Clipped(Quantize):
    """Unbiased but for what it cuts off; promises no contraction."""

    @property
    def delta(self) -> float:
        return 0.0

    def encode(self, rows: Tensor, key: Key) -> Payload:
        size = rows.square().sum(1, keepdim=True).div(max(1, rows.shape[1])).sqrt()
        return super().encode(torch.minimum(rows, 2 * size), key)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (NormScaled(block=4096), "the error is"),
        (Forgetful(block=16), "the global generator moved"),
        (Boastful(block=16), "not unbiased"),
        (TooSmall(block=16), "row_bytes declares"),
        (Summed(block=16), "not linear"),
        (Together(0.5), "a row alone decodes to something else"),
        (Fixed(), "not homogeneous"),
        (Coarse(), "not homogeneous"),
        (Clipped(8, 2049, "stochastic"), "not unbiased"),
        (Quantize, "is a class"),
        (powersgd(4), "does not code rows"),
        (replace(topk(0.01), density=0.0001), None),  # at least one element of each row: it sends more than it says
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_what_breaks_its_word_is_caught(wrong: Compressor, words: str | None) -> None:
    if words is None:
        return check_compressor(wrong)
    with pytest.raises(AssertionError, match=words):
        check_compressor(wrong)


# --- what is particular to one family -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [SAMPLED_FROM, SAMPLED_FROM + 1, 3 * SAMPLED_FROM])
def test_a_long_row_keeps_exactly_the_largest(width: int) -> None:
    row = torch.randn(width, generator=torch.Generator().manual_seed(width))
    for k in (1, 100, width // 2, width):
        found = row[largest(row, k)].abs().sort().values
        assert torch.equal(found, row.abs().sort().values[-k:])


def test_a_sample_that_misleads_costs_only_time() -> None:
    row = torch.zeros(SAMPLED_FROM)
    row[:: max(1, row.numel() // 8192)] = 1.0  # just what the sample sees
    row[1] = 5.0
    assert int(row[largest(row, 1)]) == 5
    few = torch.zeros(SAMPLED_FROM)
    few[3] = 1.0
    assert 3 in largest(few, 10)


def test_a_heavy_tail_is_most_of_what_top_k_sends() -> None:
    row = torch.zeros(1, 1000)
    row[0, ::100] = torch.arange(1.0, 11.0)
    assert torch.equal(topk(0.01).decode(topk(0.01).encode(row, KEY), 1000, KEY), row)


def test_random_places_are_the_same_on_all_ranks_and_other_ones_in_each_step() -> None:
    def places(key: Key) -> list[int]:
        return randk(0.1).decode((torch.ones(1, 10),), 100, key.shared)[0].nonzero().squeeze(1).tolist()

    assert places(Key(0, 0, 1, "w", "send")) == places(Key(0, 0, 2, "w", "answer"))
    others = [Key(1, 0, 1, "w"), Key(0, 1, 1, "w"), Key(0, 0, 1, "v")]
    assert all(places(other) != places(Key(0, 0, 1, "w")) for other in others)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topk(0), "density is 0; give the fraction of the elements that is sent, in (0, 1]"),
        (lambda: randk(1.5), "density is 1.5; give the fraction"),
        (lambda: topk(True), "density is True; give the fraction"),
        (lambda: sign(block=0), "block is 0; give a positive number of elements, for example 512"),
        (lambda: terngrad(clip=0), "clip is 0; give a positive number of standard deviations, or inf"),
        (lambda: compeft(density=2), "density is 2; give the fraction"),
        (lambda: compeft(alpha=-1), "alpha is -1; give a positive number"),
        (lambda: compeft(block=1.5), "block is 1.5; give a positive number"),  # type: ignore[arg-type]
        (
            lambda: quantize("e4m3"),
            "grid is 'e4m3'; choose one of max_min, symmetric, qsgd, e3m0, natural, least_squares",
        ),
        (lambda: quantize("e3m0", bits=8), "bits is 8; e3m0 has 4 bits, so leave it out"),
        (lambda: cast("fp8_e4m3", block=0), "block is 0; give a positive number"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("width", [1000, 1 << 17])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_top_k_refuses_bytes_that_are_no_indices_of_such_rows(width: int, density: float) -> None:
    """Whatever single bit has changed: other indices of the row, or a refusal, and never an index that it lacks."""
    values, packed = topk(density).encode(torch.randn(2, width), KEY)
    said = []
    for number, place in enumerate(torch.linspace(0, packed.shape[1] - 1, 40).long().tolist()):
        damaged = packed.clone()
        damaged[1, place] ^= 1 << (number % 8)
        try:
            assert topk(density).decode((values, damaged), width, KEY.shared).shape == (2, width)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 5
    assert all(f"{values.shape[1]} ascending positions of {width}: it was damaged on" in text for text in said)


@given(st.integers(0, 3000), st.floats(1e-4, 1.0), st.integers(0, 3), seeds)
def test_indices_come_back_from_as_many_bytes_as_declared(width: int, density: float, m: int, seed: int) -> None:
    k = kept(density, width)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(width, generator=generator)[:k].sort().values for _ in range(m)]
    indices = torch.stack(drawn) if m else torch.zeros(0, k, dtype=torch.int64)
    packed = packed_indices(indices, width)
    assert torch.equal(unpacked_indices(packed, k, width), indices)
    assert packed.shape == (m, topk(density).row_bytes(width) - 4 * k)
    if k:  # log2 of the number of choices is at least k log2(width / k)
        assert packed.shape[1] <= k * (2 + math.log2(width / k)) / 8 + 1


def test_values_of_top_k_are_coded_by_another_compressor() -> None:
    row, coded = torch.randn(2, 1000), topk(0.1, values=quantize(bits=8, block=50))
    payload = coded.encode(row, KEY)
    wanted = quantize(bits=8, block=50).decode(payload[:-1], 100, KEY)
    found = coded.decode(payload, 1000, KEY.shared)
    assert torch.equal(found[found != 0], wanted[wanted != 0]) and coded.delta == 0.1 * coded.values.delta
    assert coded.row_bytes(1000) == quantize(bits=8, block=50).row_bytes(100) + topk(0.1).row_bytes(1000) - 400
    assert str(topk(0.1)) == "TopK(density=0.1)" and "values=Quantize(bits=8" in str(coded)  # as states have it
    for wrong in ("int8", topk(0.1), powersgd(2), None):
        with pytest.raises(TypeError, match="give a compressor of all elements, such as quantize"):
            topk(0.1, values=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guarantees no contraction"):
        error_feedback(topk(0.1, values=quantize(bits=2)))
