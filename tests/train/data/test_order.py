"""Every epoch visits every example once, in an order that the seed and the epoch alone decide."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.train.data.order import example_at

LENGTHS = st.one_of(
    st.integers(1, 9), st.sampled_from([15, 16, 17, 63, 64, 65, 255, 256, 257, 1000]), st.integers(1, 600)
)
SEEDS = st.integers(-(2**70), 2**70)


def epoch_of(seed: int, epoch: int, length: int) -> list[int]:
    return [example_at(seed, position, length) for position in range(epoch * length, (epoch + 1) * length)]


@settings(max_examples=60)
@given(SEEDS, st.integers(0, 10**6), LENGTHS)
def test_an_epoch_is_a_permutation(seed: int, epoch: int, length: int) -> None:
    assert sorted(epoch_of(seed, epoch, length)) == list(range(length))


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 2), st.integers(0, 1000), st.integers(50, 200))
def test_epochs_and_seeds_differ(seed: int, epoch: int, length: int) -> None:
    order = epoch_of(seed, epoch, length)
    assert order != epoch_of(seed, epoch + 1, length)
    assert order != epoch_of(seed + 1, epoch, length)
    assert order != list(range(length))


@given(SEEDS, st.integers(0, 2**80), st.integers(1, 2**60))
def test_long_runs_over_large_data_stay_in_range(seed: int, position: int, length: int) -> None:
    assert 0 <= example_at(seed, position, length) < length


def test_known_answers() -> None:
    """A change here would move the examples of every run that was stored before it."""
    assert epoch_of(0, 0, 10) == [8, 3, 9, 4, 2, 7, 5, 6, 1, 0]
    assert epoch_of(0, 1, 10) == [7, 3, 6, 1, 2, 8, 0, 5, 9, 4]
    assert [example_at(1, position, 1000) for position in (0, 1, 999, 1000, 10**12)] == [631, 233, 966, 653, 524]
    assert example_at(2**70 - 3, 5, 2**40) == 416030975886
    assert example_at(-1, 0, 7) == 3


@pytest.mark.parametrize(("length", "orders"), [(1, 1), (2, 2), (3, 6), (4, 24)])
def test_small_data_sees_every_order(length: int, orders: int) -> None:
    assert len({tuple(epoch_of(seed, 0, length)) for seed in range(400)}) == orders


def test_neighbours_are_unrelated() -> None:
    order = [example_at(1, position, 85_109) for position in range(5000)]
    assert abs(statistics.correlation(order[:-1], order[1:])) < 0.05  # 3.5 standard errors
    assert statistics.mean(order) == pytest.approx(85_109 / 2, rel=0.03)


@pytest.mark.parametrize("length", [0, -3])
def test_empty_data_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length is {length}"):
        example_at(0, 0, length)


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="position is -1"):
        example_at(0, -1, 10)
