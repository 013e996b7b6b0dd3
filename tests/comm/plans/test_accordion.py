"""Accordion: calm layers are compressed more, all ranks agree, and it composes with L-GreCo."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dtrain.comm.layout import Matrix
from dtrain.comm.plans.accordion import Accordion, ChoosingAccordion
from dtrain.comm.seeds import Key
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import error_feedback, powersgd, quantize, topk
from dtrain.plans import accordion, lgreco
from tests.comm.zoo import draw

LIES = {"w": Matrix(64 * 32, 32, 0), "v": Matrix(64 * 32, 32, 0)}


def looked_at(plan: Accordion, scales: list[dict[str, float]], world: int = 2) -> list[ChoosingAccordion]:
    """Exchanges of gradients whose norms are ``scales``, one exchange after the other."""
    plans = [plan.begin(list(LIES)) for _ in range(world)]
    for step, scale in enumerate(scales):
        for rank, mine in enumerate(plans):
            if mine.due():
                for fqn, lies in LIES.items():
                    value: Tensor = scale[fqn] * draw(7 + rank, lies.numel)
                    mine.measure(fqn, value, value, lies, world, Key(0, step, rank, fqn))
        simulate([mine.review() for mine in plans])
    return plans


def test_a_layer_whose_norm_stands_still_is_compressed_more() -> None:
    low, high = error_feedback(topk(0.1)), error_feedback(topk(0.01))
    plan = accordion(low, high, every=2)
    steady, falling = {"w": 1.0, "v": 1.0}, {"w": 0.9, "v": 0.3}
    (first, second) = looked_at(plan, [steady] * 3 + [falling])
    assert first.of("w", 0) == high and first.of("v", 0) == low
    assert first.calm == second.calm and first.changes == 1
    assert "1 of 2 parameters in a critical regime" in first.table()


def test_everything_is_critical_until_it_has_looked_twice() -> None:
    (first, _) = looked_at(accordion(quantize(bits=8), quantize(bits=4), every=2), [{"w": 1.0, "v": 1.0}] * 3)
    assert first.of("w", 0).compressor == quantize(bits=8)


def test_zeros_are_critical_and_nothing_divides_by_them() -> None:
    (first, _) = looked_at(accordion(quantize(bits=8), quantize(bits=4), every=1), [{"w": 0.0, "v": 1.0}] * 3)
    assert first.of("w", 0).compressor == quantize(bits=8) and first.of("v", 0).compressor == quantize(bits=4)


def test_what_is_not_finite_decides_nothing() -> None:
    scales = [{"w": 1.0, "v": 1.0}, {"w": torch.nan, "v": 1.0}]
    (first, _) = looked_at(accordion(quantize(bits=8), quantize(bits=4), every=1), scales)
    assert first.calm == {"w": False, "v": False} and first.norms["w"] > 0


def test_with_l_greco_the_calm_layers_get_its_choice_and_all_of_it_comes_back() -> None:
    plan = accordion(error_feedback(powersgd(8)), lgreco(error_feedback(powersgd(2)), every=4, alpha=1.1), every=2)
    (first, second) = looked_at(plan, [{"w": 1.0, "v": 1e-3}] * 4)  # errors of v hardly count
    assert first.plans[1].changes == 1 and first.calm == {"w": True, "v": True}
    again = plan.begin(list(LIES))
    again.load_numbers(second.numbers())
    assert again.numbers() == first.numbers() and again.norms == first.norms
    assert [again.of(fqn, 0) for fqn in LIES] == [first.of(fqn, 0) for fqn in LIES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"every": 0}, "every is 0; give a positive number"), ({"threshold": 0}, "threshold is 0; give a positive")],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        accordion(None, topk(0.1), **arguments)  # type: ignore[arg-type]
