"""Projections: what they keep of a vector, that they are unbiased, and that everybody decodes the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.all_reduce import native_mean
from dtrain.comm.collectives.two_phase import two_phase
from dtrain.comm.compressors.projection import Projection, shrinkage
from dtrain.comm.feedback import as_compression
from dtrain.comm.ops import Place
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import projection
from tests.comm.zoo import draw

KEY = Key(5, 0, 1, "w", "send")


def kept(compressor: Projection, x: Tensor, step: int) -> Tensor:
    key = replace(KEY, step=step)
    return compressor.decode(compressor.encode(x.view(1, -1), key), x.numel(), key.shared)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("directions", "size"), [(16, 2410), (256, 2410), (1024, 2410), (8, 65)])
def test_cosine_and_norm_are_those_of_random_directions(directions: int, size: int) -> None:
    x, unbiased = draw(1, size), projection(directions, block=size, scaled=True)
    shrunk = projection(directions, block=size)
    found = [kept(unbiased, x, step) for step in range(60)]
    cosine = sum(float(y @ x / (y.norm() * x.norm())) for y in found) / len(found)
    ratio = sum(float(y.norm() / x.norm()) for y in found) / len(found)
    assert cosine == pytest.approx(math.sqrt(directions / (directions + size)), rel=0.1)
    assert ratio == pytest.approx(math.sqrt((directions + size) / directions), rel=0.1)
    torch.testing.assert_close(kept(shrunk, x, 0), found[0] * shrinkage(directions, size), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_mean_of_many_draws_is_the_vector() -> None:
    x, unbiased = draw(2, 200), projection(16, block=200, scaled=True)
    mean = torch.stack([kept(unbiased, x, step) for step in range(2000)]).mean(0)
    assert float(mean @ x / (x @ x)) == pytest.approx(1.0, abs=0.02)
    error = math.sqrt((200 + 15) / 16 / 2000)  # of the mean of 2000, relative to the vector
    assert float((mean - x).norm() / x.norm()) < 1.3 * error


class Orthogonal(Projection):
    """As many directions as elements, orthogonal: Hadamard's signs."""

    def _whole(self, width: int) -> bool:
        return False

    def _drawn(self, size: int, key: Key, device: torch.device) -> Tensor:
        signs = torch.ones(1, 1)
        while len(signs) < size:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return signs


def test_orthogonal_directions_lose_nothing() -> None:
    x = draw(3, 64)
    torch.testing.assert_close(kept(Orthogonal(64, 64, True), x, 0), x, rtol=1e-6, atol=1e-6)


def test_rows_are_decoded_alike_together_and_alone() -> None:
    rows, compressor = draw(4, 3 * 5000).view(3, 5000), projection(16, block=512)
    (numbers,) = compressor.encode(rows, KEY)
    together = compressor.decode((numbers,), 5000, KEY.shared)
    for row, own in zip(together, numbers, strict=True):
        assert torch.equal(row, compressor.decode((own.unsqueeze(0),), 5000, KEY.shared)[0])


def test_the_second_phase_loses_nothing() -> None:
    """The mean of what the ranks sent, on both routes."""
    compression, world = as_compression(projection(4, block=50)), 3
    own = [{"w": draw(10 + rank, 333)} for rank in range(world)]
    keys = [replace(KEY, rank=rank, fqn="") for rank in range(world)]
    routed = simulate([
        two_phase(own[rank], compression, rank_order_mean, Place(rank, world), keys[rank], State({}))
        for rank in range(world)
    ])  # fmt: skip
    summed = simulate([native_mean(own[rank], compression, keys[rank], State({})) for rank in range(world)])
    compressor = compression.compressor
    assert isinstance(compressor, Projection)
    key = replace(keys[0], fqn="w")
    chunks = torch.stack([each["w"].view(world, 111) for each in own])  # [rank, chunk, ...]
    sent = [compressor.decode(compressor.encode(rows, key), 111, key.shared) for rows in chunks]
    expected = torch.stack(sent).mean(0).flatten()
    for result in routed:
        torch.testing.assert_close(result.values["w"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(result.values["w"], routed[0].values["w"])
    whole = [compressor.decode(compressor.encode(each["w"].view(1, -1), key), 333, key.shared) for each in own]
    for other in summed:
        torch.testing.assert_close(other.values["w"], torch.stack(whole).mean(0)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("directions", "block"), [(0, 1024), (32, 64), (True, 1024), (32, 0)])
def test_numbers_that_make_nothing_smaller(directions: int, block: int) -> None:
    with pytest.raises(ValueError, match="give"):
        projection(directions, block=block)


@pytest.mark.slow
@pytest.mark.parametrize("directions", [1, 2, 3, 4, 5, 6])
def test_few_directions_that_depend_on_each_other_still_answer(directions: int) -> None:
    """Of a mean that lies in their span, as it always does, the second phase loses nothing, whatever was drawn."""
    size = 2 * directions + 1
    coder = projection(directions, block=size)
    for step in range(300):
        key = Key(1, step, 0, "w", "answer")
        along = coder._drawn(size, key, torch.device("cpu"))
        mean = torch.randn(3, directions, generator=torch.Generator().manual_seed(step)) @ along
        found = coder.decode(coder.encode(mean, key), size, key.shared)
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)
