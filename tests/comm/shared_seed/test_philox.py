"""Philox: the known answers, and numbers that depend on their address alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.shared_seed.philox import Address, SharedRandom, golden, philox

RANDOM, AT = SharedRandom(0x5EED), Address("test", 3, 1, 2)
KINDS = {"signs": RANDOM.signs, "normal": RANDOM.normal}

# Random123's vectors for philox4x32 with ten rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_known_answers(counter: str, key: str, words: str) -> None:
    x0, x1, x2, x3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [int(word) for word in philox((x0, x1, x2, x3), (k0, k1))] == [int(word, 16) for word in words.split()]


def test_what_it_draws_never_changes() -> None:
    """A log that was written yesterday must be replayed tomorrow."""
    assert golden() == GOLDEN
    signs = RANDOM.signs(AT, "blocks.0.weight", 64)
    assert "".join("+" if sign > 0 else "-" for sign in signs.tolist()) == SIGNS
    assert [round(2**20 * x) for x in RANDOM.normal(AT, "blocks.0.weight", 6).tolist()] == NORMALS


GOLDEN = "6971be03e2d37b0e"
SIGNS = "+--+--+---+-+--+-+--++-+---+-----+--+++++++-+++++-+-+---++-+-+--"
NORMALS = [209682, -1914043, 1950175, -1007605, 1343189, 1883664]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 700), st.integers(0, 700))
def test_a_part_is_what_the_whole_has_there(kind: str, start: int, numel: int) -> None:
    whole = KINDS[kind](AT, "w", 1400)
    assert torch.equal(KINDS[kind](AT, "w", numel, start=start), whole[start : start + numel])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(13, 31), (5,), (1, 129), (64, 64), (3, 1)])
def test_shards_together_hold_what_the_parameter_has(kind: str, ways: int, shape: tuple[int, ...]) -> None:
    """Cut as FSDP2 cuts, by rows, where the last may be short or empty, and as ZeRO does, anywhere."""
    numel, rows = math.prod(shape), shape[0]
    whole = KINDS[kind](AT, "w", numel)
    for unit in (numel // rows, 1):
        width = -(-numel // unit // ways) * unit
        cuts = [(min(part * width, numel), min((part + 1) * width, numel)) for part in range(ways)]
        parts = [KINDS[kind](AT, "w", stop - start, start=start) for start, stop in cuts]
        assert torch.equal(torch.cat(parts), whole)


def test_far_elements_and_large_keys() -> None:
    far = 128 * (2**32 + 5)  # beyond 32 bits of blocks
    assert not torch.equal(RANDOM.signs(AT, "w", 128, start=far), RANDOM.signs(AT, "w", 128, start=128 * 5))
    assert torch.equal(RANDOM.signs(AT, "w", 100, start=far + 28), RANDOM.signs(AT, "w", 128, start=far)[28:])
    assert not torch.equal(SharedRandom(1 << 63).signs(AT, "w", 128), SharedRandom(0).signs(AT, "w", 128))


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_the_address_is_forgotten(kind: str) -> None:
    addresses = [
        AT,
        Address("other", 3, 1, 2),
        Address("test", 4, 1, 2),
        Address("test", 3, 2, 2),
        Address("test", 3, 1, 3),
    ]
    drawn: list[Tensor] = [KINDS[kind](at, fqn, 4096) for at in addresses for fqn in ("w", "v")]
    drawn.append(getattr(SharedRandom(0x5EEE), kind)(AT, "w", 4096))
    together = torch.stack(drawn)
    likeness = together @ together.T / 4096 - torch.eye(len(drawn))
    assert likeness.abs().max() < 0.1  # six standard deviations
    assert Address("t", 11, 1).stream("w") != Address("t", 1, 11).stream("w") != Address("t", 1, 1, 1).stream("w")


@pytest.mark.parametrize("kind", KINDS)
def test_mean_variance_and_correlation_along_the_vector(kind: str) -> None:
    drawn = KINDS[kind](AT, "w", 2**20).double()
    sigma = 2**-10
    assert abs(drawn.mean()) < 5 * sigma
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2) * sigma
    for lag in (1, 2, 31, 32, 127, 128, 4096):
        assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 5 * sigma
    if kind == "normal":
        assert abs(drawn.pow(4).mean() - 3) < 0.06
        assert drawn.abs().max() < 4.33
    else:
        assert set(drawn.unique().tolist()) == {-1.0, 1.0}


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        SharedRandom(2**64)
    with pytest.raises(ValueError, match="are not elements of a parameter"):
        RANDOM.signs(AT, "w", 4, start=-1)
    assert RANDOM.signs(AT, "w", 0).shape == (0,)
