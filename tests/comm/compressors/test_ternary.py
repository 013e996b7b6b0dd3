"""Ternary codes: positions in a fixed number of bits, and ComPEFT beside its paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.compressors.positions import position_bits, positions_of_bits, positions_to_bits
from dtrain.comm.seeds import Key
from dtrain.compress import compeft
from tests.comm.zoo import draw

KEY = Key(0, 0, 1, "w", "send")


@given(st.integers(1, 300), st.data())
@settings(max_examples=60)
def test_positions_come_back_from_bits_whose_number_is_known(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    chosen = [sorted(data.draw(st.permutations(range(n)))[:k]) for _ in range(2)]
    positions = torch.tensor(chosen)
    bits = positions_to_bits(positions, n)
    assert bits.shape == (2, position_bits(n, k)) and int(bits.max()) <= 1
    assert torch.equal(positions_of_bits(bits, n, k), positions)


@pytest.mark.parametrize(("n", "k"), [(2048, 103), (2048, 205), (2048, 614), (1 << 20, 1000)])
def test_no_code_is_shorter_by_more_than_0_6_bits_a_position(n: int, k: int) -> None:
    least = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    assert least < position_bits(n, k) < least + 0.6 * k


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_bits_that_code_no_such_positions_are_refused(density: float) -> None:
    k = math.ceil(density * 200)
    bits = positions_to_bits(torch.arange(200 - k, 200)[None], 200)
    fewer = bits.clone()
    fewer[0, int(bits[0].nonzero()[0])] = 0
    with pytest.raises(ValueError, match=f"does not hold {k} ascending positions of 200: it was damaged on its way"):
        positions_of_bits(fewer, 200, k)
    if density == 0.05:  # the highest bucket is not full
        with pytest.raises(ValueError, match="ascending positions of 200: it was damaged on its way"):
            positions_of_bits(bits | (torch.arange(bits.shape[1]) >= bits.shape[1] - 4).to(torch.uint8), 200, k)


def as_written(update: Tensor, density: float, alpha: float) -> Tensor:
    """Algorithm 1 of arXiv:2311.13171: the signs of the largest, times alpha standard deviations."""
    k = math.ceil(density * update.numel())
    least = update.abs().kthvalue(update.numel() - k + 1).values
    return alpha * update.std() * torch.where(update.abs() >= least, update.sign(), torch.zeros(()))


def golomb_bytes(n: int, density: float) -> float:
    """Of the paper: Golomb codes of the gaps between ``density`` n positions, with a sign each."""
    golden = math.log((math.sqrt(5) - 1) / 2)
    bits = 1 + math.floor(math.log2(golden / math.log(1 - density)))
    return float(n * density * (bits + 1 / (1 - (1 - density) ** (2**bits)) + 1) / 8)


@pytest.mark.parametrize(("density", "alpha"), [(0.05, 1.0), (0.1, 2.0), (0.2, 1.0), (0.5, 0.5)])
def test_compeft_is_the_papers_in_little_more_bytes(density: float, alpha: float) -> None:
    n = 50_000
    update = draw(1, n) * torch.rand(n, generator=torch.Generator().manual_seed(2)).pow(3)
    compressor = compeft(density=density, alpha=alpha, block=n)
    found = compressor.decode(compressor.encode(update[None], KEY), n, KEY.shared)[0]
    torch.testing.assert_close(found, as_written(update, density, alpha), rtol=1e-4, atol=0)
    assert compressor.row_bytes(n) < 1.13 * golomb_bytes(n, density)
