"""Every compressor keeps what it declares; and compressors that do not are caught."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.compressors.quantize import Quantize
from dtrain.comm.compressors.sign import Sign
from dtrain.comm.compressors.sparse import SAMPLED_FROM, TopK, largest
from dtrain.comm.ops import Payload
from dtrain.comm.seeds import Key
from dtrain.compress import cast, compeft, powersgd, quantize, randk, sign, terngrad, topk
from dtrain.testing import check_compressor
from tests.comm.zoo import COMPRESSORS

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
def test_top_k_refuses_places_that_a_row_does_not_have(width: int) -> None:
    values, places = topk(0.01).encode(torch.randn(2, width), KEY)
    places[1, 3] = torch.iinfo(places.dtype).max
    with pytest.raises(ValueError, match=f"a top-k payload holds indices from .* of rows of {width}: it was damaged"):
        topk(0.01).decode((values, places), width, KEY.shared)
