"""EF21-W: weights by how rough each worker's loss is, EF21 where they cannot matter, and its identity where they do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.layout import Matrix
from dtrain.comm.ops import Place
from dtrain.comm.plans.adaptive import Choosing, begun
from dtrain.comm.plans.plan import Plan, as_plan, kinds_of
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import cast, ef21, powersgd, topk
from dtrain.plans import ef21w
from tests.comm.zoo import draw

WORLD, DIM, WARMUP = 3, 96, 4
LIES = Matrix(DIM, 12, 0)
ROUGHNESS = torch.tensor([1.0, 2.0, 5.0])


def descend(plan: Plan, steps: int) -> tuple[Tensor, list[Choosing], list[State]]:
    """Gradient descent on f_i(x) = roughness_i |x - c_i|^2 / 2; the point [DIM] after ``steps``."""
    plans = [begun(plan, ["w"]) for _ in range(WORLD)]
    states = [State(kinds_of(plan)) for _ in range(WORLD)]
    x = torch.zeros(DIM)
    for step in range(steps):
        flows = []
        for rank, (mine, state) in enumerate(zip(plans, states, strict=True)):
            gradient, key = ROUGHNESS[rank] * (x - draw(rank, DIM)), Key(0, step, rank)
            if mine.due():
                feedback = mine.of("w", step).feedback
                fresh, meant = feedback.fresh("w", gradient, state), feedback.correct("w", gradient, state)
                mine.measure("w", fresh, meant, LIES, WORLD, key)
            place = Place(rank, WORLD)
            flows.append(exchange({"w": gradient}, mine, rank_order_mean, place, key, state, matrices={"w": LIES}))
        found = simulate(flows)
        for state in states:
            state.commit()
        simulate([mine.review(State({}), 0.1) for mine in plans])
        x = x - 0.05 * found[0].values["w"]
    return x, plans, states


def test_weights_are_the_smoothness_of_each_loss() -> None:
    _, plans, _ = descend(ef21w(topk(0.2), warmup_steps=WARMUP), WARMUP + 1)
    scales = torch.tensor([plan.scale for plan in plans])  # type: ignore[attr-defined]
    torch.testing.assert_close(scales, ROUGHNESS / ROUGHNESS.mean())
    assert "scale of this replica 0.375" in plans[0].table() and plans[0].changes == 1


def test_around_a_homogeneous_compressor_it_is_ef21() -> None:
    with_weights, _, _ = descend(ef21w(topk(0.2), warmup_steps=WARMUP), 12)
    without, _, _ = descend(as_plan(ef21(topk(0.2), eta=1)), 12)
    torch.testing.assert_close(with_weights, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compressor", [topk(0.1), cast("bf16")])
def test_what_is_applied_is_the_mean_of_the_estimates(compressor: Compressor) -> None:
    _, _, states = descend(ef21w(compressor, warmup_steps=WARMUP), WARMUP + 5)
    estimates = torch.stack([state.tensors["w"]["estimate"] for state in states])
    for state in states:
        torch.testing.assert_close(state.tensors["w"]["mean_estimate"], estimates.mean(0), rtol=1e-5, atol=1e-5)


def test_the_last_gradient_is_kept_in_the_warm_up_alone() -> None:
    plan = ef21w(topk(0.1), warmup_steps=WARMUP)
    assert "last_gradient" in descend(plan, WARMUP)[2][0].tensors["w"]
    assert "last_gradient" not in descend(plan, WARMUP + 1)[2][0].tensors["w"]


def test_weights_come_back_bitwise_and_are_frozen() -> None:
    spec = ef21w(topk(0.1), warmup_steps=WARMUP)
    _, plans, _ = descend(spec, WARMUP + 3)
    again = spec.begin(["w"])
    again.load_numbers(plans[2].numbers())
    assert again.numbers() == plans[2].numbers() and not again.due()
    assert again.of("w", 0) == plans[2].of("w", 0)


def test_zeros_weigh_the_same_and_what_is_not_finite_counts_nothing() -> None:
    plans = [ef21w(topk(0.1), warmup_steps=2).begin(["w"]) for _ in range(WORLD)]
    for size in (0.0, torch.nan):
        for plan in plans:
            plan.measure("w", torch.full((DIM,), size), torch.zeros(DIM), LIES, WORLD, Key(0, 0))
        simulate([plan.review(State({}), 0.1) for plan in plans])
    assert [plan.scale for plan in plans] == [1.0] * WORLD and not plans[0].due()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=re.escape("is homogeneous, so weights change nothing; use ef21(...) around")):
        ef21w(powersgd(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup_steps is 0; give a positive number of exchanges"):
        ef21w(topk(0.1), warmup_steps=0)
    with pytest.raises(ValueError, match="guarantees no contraction"):
        ef21w(cast("fp16"))
