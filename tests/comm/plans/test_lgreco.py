"""L-GreCo: the best choice under a true constraint, the same on all ranks, and kept."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.collectives.routes import value_bytes
from dtrain.comm.layout import Matrix
from dtrain.comm.ops import Place
from dtrain.comm.plans.adaptive import begun
from dtrain.comm.plans.lgreco import FIRST, UNUSABLE, ChoosingLGreCo, LGreCo, _by_steps, costs, solve
from dtrain.comm.plans.plan import kinds_of
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import cast, error_feedback, powersgd, quantize, randk, sign, topk
from dtrain.plans import lgreco
from tests.comm.zoo import draw


def table(seed: int, layers: int, choices: int) -> tuple[Tensor, Tensor]:
    """Errors that fall and sizes that grow with the choice, as in life."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(layers, 1, generator=generator, dtype=torch.float64).mul_(5).exp_()
    errors = torch.rand(layers, choices, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    sizes = torch.rand(layers, choices, generator=generator, dtype=torch.float64).sort(1).values
    return errors * scale, sizes * scale


def totals(errors: Tensor, sizes: Tensor, chosen: list[int]) -> tuple[float, float]:
    rows = torch.arange(len(chosen))
    return float(errors[rows, chosen].sum()), float(sizes[rows, chosen].sum())


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60)
def test_it_is_the_best_of_all_choices_up_to_the_grid(seed: int, layers: int, choices: int) -> None:
    errors, sizes = table(seed, layers, choices)
    uniform = seed % choices
    found = solve(errors, sizes, uniform)
    budget, allowed = totals(errors, sizes, [uniform] * layers)
    error, size = totals(errors, sizes, found)
    assert error <= budget * (1 + 1e-9) and size <= allowed
    # Rounded up, every error is at most a step of the grid larger: with that much less to spend nothing is cheaper.
    tight = budget * (1 - layers / 10_000)
    every = (totals(errors, sizes, list(chosen)) for chosen in itertools.product(range(choices), repeat=layers))
    assert size <= min((s for e, s in every if e <= tight), default=allowed) + 1e-9


@given(st.integers(0, 2**31), st.floats(0.1, 4.0))
@settings(max_examples=30)
def test_the_true_constraint_holds_for_any_alpha_or_it_says_so(seed: int, alpha: float) -> None:
    errors, sizes = table(seed, 12, 8)
    budget = alpha * float(errors[:, 3].sum())
    if float(errors.amin(1).sum()) > budget:
        with pytest.raises(ValueError, match="raise alpha"):
            solve(errors, sizes, 3, alpha)
    else:
        found = solve(errors, sizes, 3, alpha)
        assert totals(errors, sizes, found)[0] <= budget * (1 + 1e-9) or found == [3] * 12


def test_layers_without_error_take_what_is_smallest() -> None:
    errors, sizes = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([[5.0, 2.0]] * 3, dtype=torch.float64)
    assert solve(errors, sizes, 0) == [1, 1, 1]


# --- what a choice costs --------------------------------------------------------------------------------------------


def test_the_error_of_a_rank_is_the_tail_of_the_singular_values() -> None:
    lies = Matrix(60 * 40, 40, 0)
    value = draw(1, lies.numel)
    squares = torch.linalg.svdvals(lies.view(value).double()).square()
    errors, sizes = costs(value, [powersgd(2), powersgd(5), powersgd(30)], lies, 2, Key(0, 0))
    assert errors.tolist() == pytest.approx([float(squares[2:].sum()), float(squares[5:].sum()), 0.0])
    assert sizes[0] < sizes[1] < sizes[2]  # the last is not worth factors, so it is sent as it is


@pytest.mark.parametrize("compressor", [quantize(bits=4, block=64), topk(0.1), randk(0.1)])
def test_the_error_of_a_choice_is_what_it_loses(compressor: object) -> None:
    value = draw(1, 600)
    (error,), (size,) = costs(value, [compressor], Matrix(600, 30, 0), 3, Key(0, 0))  # type: ignore[list-item]
    assert 0 < float(error) < float(value.double().square().sum())
    assert float(size) == value_bytes("auto", 600, compressor, 3)  # type: ignore[arg-type]


def test_under_feedback_a_choice_without_a_promise_must_show_a_contraction() -> None:
    """Two bits for blocks of 512 are no contraction on what hides between two large elements."""
    spec = lgreco(error_feedback(quantize(bits=8, block=512)))
    plan = spec.begin(["easy", "hard"])
    hard = torch.full((512,), 0.16)  # half-way between codes: as far off as can be
    hard[0], hard[1] = 1.0, -1.0
    for fqn, value in (("easy", draw(1, 512)), ("hard", hard)):
        plan.measure(fqn, value, value, Matrix(512, 16, 0), 1, Key(0, 0))
    two_bits = 0
    assert plan._costs["easy"][0, two_bits] < 1e6 and plan._costs["hard"][0, two_bits] == UNUSABLE
    assert bool(torch.isfinite(plan._costs["hard"]).all())


# --- at work --------------------------------------------------------------------------------------------------------

SIZES = {"flat": (64, 32), "steep": (64, 32), "vector": (40, 1)}
LIES = {fqn: Matrix(rows * columns, columns, 0) for fqn, (rows, columns) in SIZES.items()}


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    """One matrix of full rank, one that is nearly of rank 1, and a vector."""
    flat = draw(1000 * step + rank, 64 * 32)
    outer = draw(step, 64)[:, None] * draw(step + 7, 32)[None]
    return {"flat": flat, "steep": 9 * outer.reshape(-1) + 0.01 * flat, "vector": draw(rank, 40)}


def train(plan: LGreCo, steps: int, world: int = 3) -> tuple[list[ChoosingLGreCo], list[State]]:
    plans = [begun(plan, list(SIZES)) for _ in range(world)]
    states = [State(kinds_of(plan)) for _ in range(world)]
    for step in range(steps):
        flows = []
        for rank, (mine, state) in enumerate(zip(plans, states, strict=True)):
            values, key = gradients(step, rank), Key(0, step, rank)
            if mine.due():
                for fqn, value in values.items():
                    feedback = mine.of(fqn, step).feedback
                    fresh, meant = feedback.fresh(fqn, value, state), feedback.correct(fqn, value, state)
                    mine.measure(fqn, fresh, meant, LIES[fqn], world, key)
            flows.append(exchange(values, mine, rank_order_mean, Place(rank, world), key, state, matrices=LIES))
        assert all(found.finite for found in simulate(flows))
        for state in states:
            state.commit()
        simulate([mine.review(State({}), 0.1) for mine in plans])
    return plans, states  # type: ignore[return-value]


def test_ranks_go_where_they_pay_and_all_agree() -> None:
    plans, states = train(lgreco(error_feedback(powersgd(4))), FIRST)
    first = plans[0]
    assert all(other.chosen == first.chosen for other in plans)
    assert first.of("steep", 0).compressor.rank < first.of("flat", 0).compressor.rank  # type: ignore[union-attr]
    assert first.changes == 1 and "rank" in first.table()
    before = states[0].tensors["steep"]["residual"].clone()
    assert bool(before.any())  # residuals are not thrown away with the plan


def test_it_waits_for_its_turn() -> None:
    plans, _ = train(lgreco(error_feedback(powersgd(4))), FIRST - 1)
    assert plans[0].changes == 0 and set(plans[0].chosen.values()) == {2}


def test_small_gains_are_not_worth_a_change() -> None:
    plans, _ = train(lgreco(error_feedback(powersgd(4)), hysteresis=0.9), FIRST)
    assert plans[0].changes == 0


def test_it_comes_back_from_its_numbers() -> None:
    spec = lgreco(error_feedback(quantize(bits=4, block=64)))
    plans, _ = train(spec, FIRST)
    again = spec.begin(list(SIZES))
    again.load_numbers(plans[0].numbers())
    assert again.chosen == plans[0].chosen and again.exchanges == FIRST and again.changes == plans[0].changes


def test_ranks_that_disagree_say_so_before_they_use_it() -> None:
    plans = [lgreco(topk(0.1)).begin(list(SIZES)) for _ in range(2)]
    plans[1].chosen["flat"] = 0
    with pytest.raises(RuntimeError, match="ranks disagree about the plan"):
        simulate([plan._compare() for plan in plans])


def test_what_is_not_finite_changes_no_plan() -> None:
    plans = [lgreco(topk(0.1), every=1).begin(["w"]) for _ in range(2)]
    for plan in plans:
        nothing = torch.full((50,), torch.nan)
        plan.measure("w", nothing, nothing, Matrix(50, 5, 0), 2, Key(0, 0))
    simulate([plan.review(State({}), 0.1) for plan in plans])
    assert [plan.changes for plan in plans] == [0, 0]


@pytest.mark.parametrize(
    ("compress", "arguments", "error", "message"),
    [
        (sign(), {}, TypeError, "has nothing to choose by layer; lgreco takes powersgd, quantize, topk and randk"),
        (cast("bf16"), {}, TypeError, "has nothing to choose by layer"),
        (topk(0.1), {"every": 0}, ValueError, "every is 0; give a positive number of exchanges"),
        (topk(0.1), {"alpha": 0}, ValueError, "alpha is 0; give the error allowed"),
        (topk(0.1), {"hysteresis": 1}, ValueError, "hysteresis is 1; give a fraction of the bytes, in [0, 1)"),
    ],
)
def test_bad_arguments(compress: object, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lgreco(compress, **arguments)  # type: ignore[arg-type]


def test_many_layers_are_served_as_well_as_few() -> None:
    """Half of them hardly matter. Rounding each error up to a grid of one size would eat the budget, then all of it."""
    for layers in (300, 3000, 11_000):
        errors = torch.tensor([[4.0, 1.0, 0.25]], dtype=torch.float64).repeat(layers, 1)
        sizes = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).repeat(layers, 1)
        errors[: layers // 2] *= 1e-4
        found = solve(errors, sizes, 1)
        (budget, allowed), (error, size) = totals(errors, sizes, [1] * layers), totals(errors, sizes, found)
        assert error <= budget * (1 + 1e-9) and size <= 0.752 * allowed


@pytest.mark.slow
@given(st.integers(0, 2**31), st.sampled_from([0.6, 1.0, 2.0]))
@settings(max_examples=10)
def test_a_price_for_all_layers_finds_what_the_grid_finds(seed: int, alpha: float) -> None:
    errors, sizes = table(seed, 300, 5)
    errors[::7, 0] = UNUSABLE
    if float(errors.amin(1).sum()) > alpha * float(errors[:, 2].sum()):
        return
    found = solve(errors, sizes, 2, alpha)
    error, size = totals(errors, sizes, found)
    assert error <= alpha * float(errors[:, 2].sum()) * (1 + 1e-9)
    fine = _by_steps(errors, sizes, alpha * float(errors[:, 2].sum()), 30_000)
    assert fine is not None and size <= totals(errors, sizes, fine)[1] * 1.002


def test_layers_without_a_size_or_an_error_are_no_trouble() -> None:
    nothing = torch.zeros(400, 3, dtype=torch.float64)
    assert solve(nothing, nothing, 1) == [0] * 400
    assert len(solve(nothing + 1, nothing, 1)) == 400
