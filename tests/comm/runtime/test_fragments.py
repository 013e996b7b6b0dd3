"""Fragments hold every parameter once, whole blocks together, and take their turns as the schedule says."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm.runtime.fragments import Fragments, fragments

BLOCKS = {f"blocks.{n}.{part}.weight": (8, 8) for n in range(5) for part in ("attention", "feed_forward")}
MODEL = {"embedding.weight": (10, 8), **BLOCKS, "norm.weight": (8,), "head.weight": (10, 8)}


@given(st.integers(1, 6), st.sampled_from(["strided", "sequential"]))
def test_every_parameter_is_in_one_fragment_and_blocks_stay_whole(layers: int, pattern: str) -> None:
    found = fragments(layers, pattern=pattern).cut(MODEL)  # type: ignore[arg-type]
    assert sorted(fqn for part in found for fqn in part) == sorted(MODEL)
    for number in range(5):
        assert len({i for i, part in enumerate(found) for fqn in part if fqn.startswith(f"blocks.{number}.")}) == 1


def test_strided_and_sequential() -> None:
    def blocks(found: list[list[str]]) -> list[list[int]]:
        return [sorted({int(fqn.split(".")[1]) for fqn in part if fqn.startswith("blocks")}) for part in found]

    assert blocks(fragments(2).cut(BLOCKS)) == [[0, 3], [1, 4], [2]]
    assert blocks(fragments(2, pattern="sequential").cut(BLOCKS)) == [[0, 1], [2, 3], [4]]


def test_what_is_in_no_block_joins_the_smallest_fragment_or_is_one_of_its_own() -> None:
    small = fragments(2).cut({**MODEL, "embedding.weight": (4, 8), "head.weight": (4, 8)})
    assert len(small) == 3 and "embedding.weight" in small[2] and "norm.weight" in small[2]
    large = fragments(2).cut({**MODEL, "embedding.weight": (500, 8)})
    assert len(large) == 4 and large[3] == ["embedding.weight", "norm.weight", "head.weight"]


def test_two_stacks_and_a_bare_sequence_have_blocks_too() -> None:
    stacks = {f"{side}.layers.{n}.weight": (4,) for side in ("encoder", "decoder") for n in range(2)}
    assert len(fragments(1).cut(stacks)) == 4
    assert fragments(1).cut({"0.weight": (4,), "2.weight": (4,)}) == [["0.weight"], ["2.weight"]]


def due(plan: Fragments, step: int, count: int, every: int) -> list[int]:
    """After ``step`` steps in periods of one length."""
    begun = (step - 1) // every * every
    return plan.due(step - begun, count, every, first=not begun)


@given(st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_every_fragment_has_its_turn_once_in_each_period(every: int, count: int, early: bool) -> None:
    plan = Fragments(1, first_round="early" if early else "full")
    turns: dict[int, list[int]] = {number: [] for number in range(count)}
    for step in range(1, 5 * every + 1):
        for number in due(plan, step, count, every):
            turns[number].append(step)
    for number, steps in turns.items():
        assert all(later - sooner == every for sooner, later in itertools.pairwise(steps))
        assert steps[0] >= every or early
        assert len(steps) >= 3, (number, steps)


def test_the_papers_schedule_and_the_other_one() -> None:
    def turns(plan: Fragments, number: int) -> list[int]:
        return [step for step in range(1, 301) if number in due(plan, step, 2, 100)]

    assert turns(Fragments(1), 0) == [100, 200, 300] and turns(Fragments(1), 1) == [150, 250]
    early = Fragments(1, first_round="early")
    assert turns(early, 0) == [50, 150, 250] and turns(early, 1) == [100, 200, 300]
    assert turns(Fragments(1, staggered=False), 1) == [100, 200, 300]


@given(st.integers(1, 6), st.booleans(), st.data())
def test_in_periods_that_differ_no_round_is_shorter_than_the_shortest(
    count: int, early: bool, data: st.DataObject
) -> None:
    least = data.draw(st.integers(count, 12))
    periods = data.draw(st.lists(st.integers(least, 30), min_size=2, max_size=6))
    plan = Fragments(1, first_round="early" if early else "full")
    turns: dict[int, list[int]] = {number: [] for number in range(count)}
    begun = 0
    for every in periods:
        for step in range(1, every + 1):
            for number in plan.due(step, count, every, first=not begun):
                turns[number].append(begun + step)
        begun += every
    for steps in turns.values():
        assert len(steps) >= len(periods) - 1 and (early or steps[0] >= periods[0])
        assert all(later - sooner >= least for sooner, later in itertools.pairwise(steps))
    assert turns[count - 1 if early else 0] == list(itertools.accumulate(periods))


def test_by_hand() -> None:
    plan = fragments(0, patterns=[["embedding*", "head*", "norm*"], ["blocks.*"]])
    assert [len(part) for part in plan.cut(MODEL)] == [3, 10]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([["blocks.*"]], "the fragments must hold every trained parameter once: embedding.weight is in none"),
        ([["*"], ["norm*"]], "norm.weight is in two"),
        ([["*"], ["nothing*"]], "no parameter matches the fragment ['nothing*']; the names are like embedding.weight"),
    ],
)
def test_fragments_that_do_not_cover_the_parameters(patterns: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fragments(0, patterns=patterns).cut(MODEL)


def test_a_model_without_numbered_blocks() -> None:
    with pytest.raises(ValueError, match="layers_per_fragment=3 counts numbered blocks, and no parameter has a number"):
        fragments(3).cut({"body.weight": (4, 4), "head.weight": (4,)})
