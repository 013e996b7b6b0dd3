"""The learning rate warms up from the first step, never rises afterwards and ends at its final fraction."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.train.lr import SCHEDULES, learning_rate_factor


def factors(steps: int, **settings: object) -> list[float]:
    return [learning_rate_factor(step, total_steps=steps, **settings) for step in range(steps)]  # type: ignore[arg-type]


@given(st.sampled_from(SCHEDULES), st.integers(0, 30), st.integers(1, 60), st.floats(0, 1))
def test_it_rises_to_one_and_then_never_rises(schedule: str, warmup: int, steps: int, final: float) -> None:
    run = factors(steps, schedule=schedule, warmup_steps=warmup, final_fraction=final)
    assert run[:warmup] == [(step + 1) / warmup for step in range(min(warmup, steps))]
    assert all(before >= after for before, after in itertools.pairwise(run[max(warmup - 1, 0) :]))
    assert all(0 <= factor <= 1 for factor in run)


@given(st.sampled_from(["cosine", "linear"]), st.integers(0, 10), st.integers(12, 60), st.floats(0, 1))
def test_the_last_step_runs_at_the_final_fraction_and_so_do_steps_beyond_it(
    schedule: str, warmup: int, steps: int, final: float
) -> None:
    for step in (steps - 1, steps, 10 * steps):
        factor = learning_rate_factor(
            step, schedule=schedule, warmup_steps=warmup, total_steps=steps, final_fraction=final
        )
        assert factor == pytest.approx(final, abs=1e-12)


def test_known_values() -> None:
    cosine = factors(5, schedule="cosine", warmup_steps=0, final_fraction=0.0)
    assert cosine == pytest.approx([1.0, 0.85355339, 0.5, 0.14644661, 0.0], abs=1e-8)
    assert factors(5, schedule="linear", warmup_steps=0, final_fraction=0.5) == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert factors(4, schedule="constant", warmup_steps=2, final_fraction=0.1) == [0.5, 1.0, 1.0, 1.0]


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    assert factors(3, schedule="cosine", warmup_steps=10, final_fraction=0.1) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("written", "meant"), [("cosin", "cosine"), ("Linear", "linear"), ("const", "constant"), ("", "")]
)
def test_an_unknown_schedule_is_refused_with_the_nearest_name(written: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}"):
        learning_rate_factor(0, schedule=written, warmup_steps=0, total_steps=1, final_fraction=0.0)


@pytest.mark.parametrize(
    ("step", "warmup", "total", "final"), [(-1, 0, 1, 0.0), (0, -1, 1, 0.0), (0, 0, 0, 0.0), (0, 0, 1, 1.5)]
)
def test_values_out_of_range_are_refused(step: int, warmup: int, total: int, final: float) -> None:
    with pytest.raises(ValueError, match=r"is -1|is 0|is 1\.5"):
        learning_rate_factor(step, schedule="cosine", warmup_steps=warmup, total_steps=total, final_fraction=final)
