"""The alpha-beta model: on figures that it made itself, and on sweeps that were measured."""

from __future__ import annotations

import statistics

import pytest

from dtrain.bench.fit import errors, fit, hops, predict

SIZES = (4000, 16_000, 64_000, 250_000, 1_000_000, 4_000_000, 16_000_000)

# All-reduce over gloo through hosts with 5 ms one way and 50 Mbit/s (bytes -> ms), by number of ranks.
LATENCY: dict[int, dict[int, float]] = {
    2: {4000: 21.9, 100_000: 37.9, 500_000: 102.1, 2_000_000: 351.0, 4_000_000: 695.1},
    3: {3000: 43.5, 99_000: 62.9, 499_000: 185.4, 1_999_000: 489.6, 3_999_000: 1152.2},
    4: {4000: 65.7, 100_000: 83.5, 500_000: 212.4, 2_000_000: 566.2, 4_000_000: 1140.6},
}
# All-reduce of 2 ranks through a shaper of 1 Gbit/s that lets bursts of 128 KB pass: no line describes it.
BURSTS = dict(zip(SIZES, (0.62, 2.33, 1.45, 1.93, 8.18, 33.55, 134.02), strict=True))


def seconds(milliseconds: dict[int, float]) -> dict[int, float]:
    return {size: value / 1e3 for size, value in milliseconds.items()}


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "comm.all_reduce"])
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize(("alpha", "beta"), [(0.005, 8 / 50e6), (40e-6, 8 / 1e9), (0.1, 8 / 1e9)])
def test_the_fit_finds_the_link_that_made_the_figures(op: str, world: int, alpha: float, beta: float) -> None:
    found = fit(op, world, {size: predict(op, world, size, alpha, beta) for size in SIZES})
    assert found.alpha == pytest.approx(alpha) and found.beta == pytest.approx(beta) and found.usable
    assert found.residual < 1e-6


def test_other_numbers_of_ranks_are_predicted_from_two() -> None:
    found = fit("all_reduce", 2, seconds(LATENCY[2]))
    assert found.usable
    assert found.alpha == pytest.approx(0.0053, rel=0.03) and 8e-6 / found.beta == pytest.approx(47.5, rel=0.03)
    off = [abs(error) for world in (3, 4) for error in errors(found, world, seconds(LATENCY[world]))]
    assert statistics.median(off) < 0.10


def test_the_prediction_stands_on_the_steps_that_gloo_takes() -> None:
    assert [hops("all_reduce", n) for n in (2, 3, 4)] == [4, 8, 12]
    assert [hops("comm.all_gather", n) for n in (2, 4)] == [2, 6]
    with pytest.raises(ValueError, match="steps of gloo's broadcast are not known"):
        hops("broadcast", 2)


def test_a_sweep_that_bursts_have_bent_is_not_called_a_fit() -> None:
    found = fit("all_reduce", 2, seconds(BURSTS))
    assert 8e-6 / found.beta == pytest.approx(955, rel=0.01)  # the slope of the largest is the link all the same
    assert not found.usable and found.worst < 1_000_000


def test_one_size_that_went_badly_decides_neither_constant() -> None:
    sweep = {size: predict("all_reduce", 2, size, 0.005, 1e-7) for size in SIZES}
    found = fit("all_reduce", 2, {**sweep, 4_000_000: 1.1 * sweep[4_000_000]})
    assert found.beta == pytest.approx(1e-7, rel=0.02) and found.usable
    assert found.worst == 4_000_000


@pytest.mark.parametrize(("world", "sizes"), [(2, 2), (1, 5)])
def test_too_little_for_a_fit_is_refused(world: int, sizes: int) -> None:
    with pytest.raises(ValueError, match="three sizes and 2 ranks"):
        fit("all_reduce", world, dict.fromkeys(range(1, sizes + 1), 1.0))
