"""Accordion: calm layers are compressed more, all ranks agree, and it composes with L-GreCo."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dtrain import diloco, every_step
from dtrain.comm.layout import Matrix
from dtrain.comm.plans.accordion import Accordion, ChoosingAccordion
from dtrain.comm.plans.plan import kinds_of
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import error_feedback, powersgd, quantize, topk
from dtrain.plans import accordion, lgreco
from dtrain.testing.replicas import Replicas, equal
from tests.comm.zoo import draw

LIES = {"w": Matrix(64 * 32, 32, 0), "v": Matrix(64 * 32, 32, 0)}


def looked_at(
    plan: Accordion, gradients: Callable[[int, int, str], Tensor], steps: int, rates: Sequence[float] = ()
) -> list[ChoosingAccordion]:
    """``steps`` exchanges of gradients by (rank, step, FQN), at learning rates of 0.1 or ``rates``."""
    plans = [plan.begin(list(LIES)) for _ in range(2)]
    states = [State(kinds_of(plan)) for _ in plans]
    for step in range(steps):
        for rank, (mine, state) in enumerate(zip(plans, states, strict=True)):
            for fqn, lies in LIES.items():
                value = gradients(rank, step, fqn)
                mine.accumulate(fqn, value, state)
                if mine.due():
                    mine.measure(fqn, value, value, lies, 2, Key(0, step, rank, fqn))
            state.commit()
        rate = rates[step] if rates else 0.1
        simulate([mine.review(state, rate) for mine, state in zip(plans, states, strict=True)])
    return plans


def scaled(*scales: dict[str, float]) -> Callable[[int, int, str], Tensor]:
    """Gradients of the same direction in each step, of sizes ``scales``."""
    return lambda rank, step, fqn: scales[step][fqn] * draw(7 + rank, LIES[fqn].numel)


def unchanged(steps: int, w: float = 1.0, v: float = 1.0) -> Callable[[int, int, str], Tensor]:
    return scaled(*[{"w": w, "v": v}] * steps)


def test_a_layer_whose_norm_stands_still_is_compressed_more() -> None:
    low, high = error_feedback(topk(0.1)), error_feedback(topk(0.01))
    plan = accordion(low, high, every=2)
    steady, falling = {"w": 1.0, "v": 1.0}, {"w": 0.9, "v": 0.3}
    (first, second) = looked_at(plan, scaled(steady, steady, falling, falling), 4)
    assert first.of("w", 0) == high and first.of("v", 0) == low
    assert first.calm == second.calm and first.changes == 1
    assert "1 of 2 parameters in a critical regime" in first.table()


def test_everything_is_critical_until_it_has_looked_twice() -> None:
    (first, _) = looked_at(accordion(quantize(bits=8), quantize(bits=4), every=2), unchanged(3), 3)
    assert first.of("w", 0).compressor == quantize(bits=8)


def test_zeros_are_critical_and_nothing_divides_by_them() -> None:
    (first, _) = looked_at(accordion(quantize(bits=8), quantize(bits=4), every=1), unchanged(3, w=0.0), 3)
    assert first.of("w", 0).compressor == quantize(bits=8) and first.of("v", 0).compressor == quantize(bits=4)


def test_what_is_not_finite_decides_nothing() -> None:
    scales = scaled({"w": 1.0, "v": 1.0}, {"w": torch.nan, "v": 1.0})
    (first, _) = looked_at(accordion(quantize(bits=8), quantize(bits=4), every=1), scales, 2)
    assert first.calm == {"w": False, "v": False} and first.norms["w"] > 0


def noisy(rank: int, step: int, fqn: str) -> Tensor:
    """Steady gradients under noise ten times as large, which is now 1 and now 3 times as strong."""
    numel = LIES[fqn].numel
    noise = (3.0 if step % 20 == 19 else 1.0) * draw(1000 * rank + step, numel)
    return 0.1 * draw(3, numel) + noise


@pytest.mark.parametrize(("accumulate", "calm"), [(None, True), (1, False)])
def test_the_norm_is_that_of_the_gradient_over_a_period(accumulate: int | None, calm: bool) -> None:
    """Batches whose noise changes do not make a regime critical; the norm of one exchange alone would."""
    plan = accordion(quantize(bits=8), quantize(bits=4), every=10, accumulate=accumulate)
    (first, second) = looked_at(plan, noisy, 40)
    assert first.calm == second.calm == {"w": calm, "v": calm}


def test_it_is_what_the_authors_code_computes() -> None:
    """The norm of the sum over a period of each rank's gradients; here of all ranks, there of the first."""
    plan, norms = accordion(None, quantize(bits=4), every=6, accumulate=4), []
    for end in (6, 12):
        sums = [sum(noisy(rank, step, "w") for step in range(end - 4, end)) for rank in range(2)]
        norms.append(float(torch.cat([torch.as_tensor(total) for total in sums]).double().norm()))
    (first, _) = looked_at(plan, noisy, 12)
    assert first.norms["w"] == pytest.approx(norms[1], rel=1e-6)
    assert first.calm["w"] == (abs(norms[0] - norms[1]) < 0.5 * norms[0])


def test_where_the_learning_rate_has_fallen_all_is_critical_until_the_next_comparison() -> None:
    plan, steady = accordion(quantize(bits=8), quantize(bits=4), every=2), unchanged(8)
    for rates, calm in (
        ([0.1] * 4 + [0.01] * 2, False),
        ([0.1] * 4 + [0.01] * 4, True),
        ([0.1, 0.09, 0.08, 0.07, 0.06, 0.05], True),  # a smooth schedule
    ):
        (first, _) = looked_at(plan, steady, len(rates), rates)
        assert first.calm == {"w": calm, "v": calm}, rates


def one_exchange(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
    return x - draw(rank, x.numel()) + 3 * draw(100 * rank + step, x.numel())


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("step", range(1, 9))
def test_stopped_at_any_step_it_resumes_bit_identically(step: int, local: bool) -> None:
    plan = accordion(error_feedback(topk(0.5)), error_feedback(topk(0.1)), every=3, accumulate=2, threshold=1.0)
    sync = diloco(every_steps=2, compress=plan) if local else every_step(compress=plan)
    whole = Replicas(sync, 2, gradient=one_exchange)
    whole.train(step)
    again = whole.resumed()
    whole.train(14)
    again.train(14)
    assert all(equal(whole.live(rank), again.live(rank)) for rank in range(2))
    assert whole.attached[0].plan.changes > 0
    assert again.attached[0].plan.numbers() == whole.attached[0].plan.numbers()
    whole.close()
    again.close()


def test_a_step_that_is_not_made_leaves_nothing_in_the_sum() -> None:
    def spoiled(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan) if step == 1 and rank == 1 else torch.ones_like(x)

    replicas = Replicas(every_step(compress=accordion(None, quantize(bits=8), every=9)), 2, gradient=spoiled)
    replicas.train(3)
    for rank in range(2):
        assert all(bool((total == 2).all()) for total in replicas.kept(rank, "accumulated").values())
    replicas.close()


def test_one_within_another_is_refused() -> None:
    with pytest.raises(ValueError, match="accordion cannot be within another"):
        accordion(None, accordion(None, topk(0.1)))


def test_with_l_greco_the_calm_layers_get_its_choice_and_all_of_it_comes_back() -> None:
    plan = accordion(error_feedback(powersgd(8)), lgreco(error_feedback(powersgd(2)), every=4, alpha=1.1), every=2)
    (first, second) = looked_at(plan, unchanged(4, v=1e-3), 4)  # errors of v hardly count
    assert first.plans[1].changes == 1 and first.calm == {"w": True, "v": True}
    again = plan.begin(list(LIES))
    again.load_numbers(second.numbers())
    assert again.numbers() == first.numbers() and again.norms == first.norms
    assert [again.of(fqn, 0) for fqn in LIES] == [first.of(fqn, 0) for fqn in LIES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is 0; give a positive number"),
        ({"threshold": 0}, "threshold is 0; give a positive"),
        ({"accumulate": 0}, "accumulate is 0; give a number of exchanges from 1 to every (100), or None"),
        ({"every": 5, "accumulate": 6}, "accumulate is 6; give a number of exchanges from 1 to every (5)"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        accordion(None, topk(0.1), **arguments)  # type: ignore[arg-type]
