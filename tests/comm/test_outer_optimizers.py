"""Outer optimizers: what torch.optim.SGD computes, as a transaction."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.comm.methods.co2 import Penalized, co2, gap_aware
from dtrain.comm.outer_optimizers import InPlace, Momentum, Round, nesterov, sgd
from dtrain.comm.state import State
from tests.comm.zoo import NUMELS, draw, seeds

RULES = {
    "sgd": sgd(),
    "slow sgd": sgd(lr=0.3),
    "heavy ball": sgd(lr=0.5, momentum=0.8),
    "nesterov": nesterov(),
    "eager nesterov": nesterov(lr=1.0, momentum=0.5),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(numel=st.sampled_from(NUMELS), seed=seeds)
@settings(max_examples=8)
def test_it_is_what_torch_computes(rule: Momentum, numel: int, seed: int) -> None:
    start = draw(seed, numel)
    parameter = start.clone().requires_grad_()
    theirs = torch.optim.SGD([parameter], lr=rule.lr, momentum=rule.momentum, nesterov=rule.nesterov)
    state, anchor = State(rule.kinds), start
    for step in range(6):
        delta = draw(seed + 1 + step, numel)
        parameter.grad = delta.clone()
        theirs.step()
        anchor = rule.step("w", anchor, delta, state)
        state.commit()
        torch.testing.assert_close(anchor, parameter.detach(), rtol=1e-6, atol=1e-6)
        if rule.momentum:
            torch.testing.assert_close(
                state.tensors["w"]["momentum"], theirs.state[parameter]["momentum_buffer"], rtol=1e-6, atol=1e-7
            )


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_step_writes_to_nothing_and_stages_what_it_declares(rule: Momentum) -> None:
    state = State(rule.kinds)
    for step in range(3):
        anchor, delta = draw(1, 7), draw(2 + step, 7)
        kept = anchor.clone(), delta.clone(), state.get("w", "momentum", anchor).clone()
        first = rule.step("w", anchor, delta, state)
        state.rollback()
        again = rule.step("w", anchor, delta, state)  # as if the first had never been
        assert torch.equal(first, again)
        assert torch.equal(anchor, kept[0]) and torch.equal(delta, kept[1])
        assert torch.equal(state.get("w", "momentum", anchor), kept[2])
        state.commit()
        assert {name for named in state.tensors.values() for name in named} == set(rule.kinds)


def test_plain_sgd_of_rate_one_takes_the_mean() -> None:
    anchor, delta = draw(1, 9), draw(2, 9)
    assert torch.equal(sgd().step("w", anchor, delta, State({})), anchor - delta)


def test_the_first_nesterov_step_moves_one_and_nine_tenths() -> None:
    state = State(nesterov().kinds)
    anchor, delta = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(nesterov(lr=0.7).step("w", anchor, delta, state), torch.full((3,), -0.7 * 1.9))


def test_what_it_keeps() -> None:
    assert sgd(lr=0.1).kinds == {}
    assert sgd(momentum=0.5).kinds == nesterov().kinds == {"momentum": "replicated"}
    assert sgd() == Momentum(lr=1.0, momentum=0.0, nesterov=False)
    assert nesterov() == Momentum(lr=0.7, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("make", [sgd, nesterov])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; an outer learning rate is positive, usually between 0.1 and 1"),
        ({"lr": -0.7}, "lr is -0.7; an outer learning rate is positive"),
        ({"lr": float("nan")}, "lr is nan; an outer learning rate is positive"),
        ({"momentum": 1.0}, "momentum is 1.0; it lies in [0, 1)"),
        ({"momentum": -0.1}, "momentum is -0.1; it lies in [0, 1)"),
        ({"momentum": float("nan")}, "momentum is nan; it lies in [0, 1)"),
    ],
)
def test_bad_arguments(make: Callable[..., Momentum], arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without momentum is plain SGD; use sgd\(lr=...\)"):
        nesterov(lr=0.7, momentum=0.0)


@pytest.mark.parametrize("rule", [*RULES.values(), co2().outer, co2(clip=None, gap="none").outer], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 700, 2048])
def test_in_place_it_gives_the_same_bits(rule: InPlace, numel: int) -> None:
    state, in_place = State(rule.kinds), State(rule.kinds)
    anchor = draw(1, numel)
    here = anchor.clone()
    for step in range(4):
        delta, now = draw(2 + step, numel), Round(0.1 * (step % 3), 5)
        kept = delta.clone()
        anchor = rule.step("w", anchor, delta, state, now)
        state.commit()
        here = rule.step_("w", here, delta, in_place, now)
        in_place.commit()
        assert torch.equal(here, anchor) and torch.equal(delta, kept)
        for name in rule.kinds:
            assert torch.equal(state.tensors["w"][name], in_place.tensors["w"][name])


def test_the_gap_in_one_pass_is_that_of_the_rule() -> None:
    fused, composed = co2(lr=0.6).outer, Penalized(sgd(lr=0.6, momentum=0.2, clip=1.0), gap_aware)
    assert set(fused.kinds) == {"momentum"}
    states, anchors = (State(fused.kinds), State(composed.kinds)), [draw(1, 900), draw(1, 900)]
    for step in range(4):
        for number, rule in enumerate((fused, composed)):
            anchors[number] = rule.step("w", anchors[number], draw(2 + step, 900), states[number], Round(0.1, 5))
            states[number].commit()
        torch.testing.assert_close(anchors[0], anchors[1])
