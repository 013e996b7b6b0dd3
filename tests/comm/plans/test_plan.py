"""Plans that are written down beforehand, and what is said of those that cannot be meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

from dtrain import diloco, every_step
from dtrain.comm.plans.plan import Compress, unmatched
from dtrain.compress import error_feedback, powersgd, quantize, sign, topk
from dtrain.plans import after, by_layer
from dtrain.testing.replicas import Replicas

NAMES = ["embedding.weight", "blocks.0.norm.weight", "blocks.0.out.weight"]


def test_patterns_that_match_nothing_are_found_wherever_they_stand() -> None:
    inner = by_layer({"module.*": None})
    plan = after(3, inner, before=by_layer({"*norm*": None, "nosuch*": quantize()}, default=inner))
    assert unmatched(plan, NAMES) == ["nosuch*", "module.*", "module.*"]
    assert unmatched(by_layer({"*norm*": None}), NAMES) == []


def test_they_are_warned_of_when_the_model_is_known() -> None:
    with pytest.warns(RuntimeWarning, match="'nosuch' matches no parameter; names are like layers.0.weight"):
        Replicas(every_step(compress=by_layer({"nosuch": quantize()})), 1)


def test_rules_that_are_no_mapping() -> None:
    with pytest.raises(TypeError, match="rules is"):
        by_layer([("a", None)])  # type: ignore[arg-type]


@pytest.mark.parametrize("compress", [topk(0.01), sign(), powersgd(4), by_layer({"*": topk(0.1)})])
def test_what_loses_most_without_feedback_is_warned_of(compress: Compress) -> None:
    makes: list[Callable[[], object]] = [
        lambda: every_step(compress=compress), lambda: diloco(every_steps=3, compress=compress),
    ]  # fmt: skip
    for make in makes:
        with pytest.warns(RuntimeWarning, match="without feedback"):
            make()


@pytest.mark.parametrize("compress", [None, quantize(bits=8), quantize(bits=4, block=128), error_feedback(topk(0.01))])
def test_what_loses_little_or_nothing_is_not(compress: Compress) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every_step(compress=compress)


def test_a_rule_that_is_no_function() -> None:
    with pytest.raises(TypeError, match="combine is 'median'"):
        every_step(combine="median")  # type: ignore[arg-type]


def test_blocks_that_are_too_large_for_feedback_are_told_which_fit() -> None:
    with pytest.raises(ValueError, match="block=256"):
        error_feedback(quantize(bits=4))
    with pytest.raises(ValueError, match="block=16"):
        error_feedback(quantize(bits=2))
