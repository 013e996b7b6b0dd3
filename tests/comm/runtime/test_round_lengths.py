"""Rounds that differ in length: the laws of the lengths, when the loop ends which, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtrain import co2, diloco, fedavg_m, local_sgd, local_update, streaming_diloco
from dtrain.comm.outer_optimizers import PLAIN, Round
from dtrain.comm.runtime.local_updates import require_elastic
from dtrain.comm.runtime.loop import LocalUpdateLoop
from dtrain.comm.runtime.loop_spec import OuterState
from dtrain.comm.runtime.method import Sync
from dtrain.comm.state import Kind, State
from dtrain.compress import quantize
from dtrain.rounds import RoundLengths, lengths, power, qsr
from dtrain.testing.replicas import Replicas, equal
from tests.comm.methods.test_methods import require_no_trace, same_after_each_step

# --- lengths --------------------------------------------------------------------------------------------------------


def ends(rounds: RoundLengths, steps: int, lr: float = 0.1) -> list[int]:
    found = [0]
    while found[-1] < steps:
        found.append(found[-1] + rounds.length(found[-1], lr))
    return found[1:]


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.2, 4.0), st.integers(1, 20))
def test_a_power_law_ends_with_the_run_and_no_round_is_too_short(
    steps: int, rounds: int, exponent: float, least: int
) -> None:
    rounds, least = min(rounds, steps), min(least, steps)
    law = power(steps=steps, rounds=rounds, power=exponent, at_least=least)
    found = ends(law, steps)
    assert found[-1] == steps == law.steps and len(found) <= rounds
    assert law.shortest == min(later - sooner for sooner, later in itertools.pairwise([0, *found])) >= least
    exact = {max(1, math.ceil(steps * (number / rounds) ** exponent - 1e-6)) for number in range(1, rounds + 1)}
    assert set(found) <= exact | {steps}
    if least == 1:
        assert set(found) == exact
    last = steps - ([0, *found][-2])
    assert law.length(steps, 0.1) == last and law.length(steps + 3 * last, 0.1) == last


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_given_lengths_are_as_given_and_the_last_repeats(given_ones: list[int]) -> None:
    rounds = lengths(given_ones)
    assert ends(rounds, sum(given_ones)) == list(itertools.accumulate(given_ones))
    assert rounds.length(sum(given_ones) + 5 * given_ones[-1], 0.1) == given_ones[-1]
    assert (rounds.shortest, rounds.steps) == (min(given_ones), sum(given_ones))


@given(st.floats(1e-5, 1.0), st.integers(1, 50), st.just(0.0) | st.floats(1e-9, 10.0))
def test_the_quadratic_rule(alpha: float, base: int, lr: float) -> None:
    length = qsr(alpha=alpha, base=base, longest=5000).length(7, lr)
    if lr > 0 and (alpha / lr) ** 2 < 4999:
        assert length in {max(base, math.floor((alpha / lr) ** 2 + nudge)) for nudge in (-1e-6, 0, 1e-6)}
    elif not lr or (alpha / lr) ** 2 > 5001:
        assert length == 5000


@pytest.mark.parametrize("lr", [math.nan, -1.0, 0.0])
def test_a_rate_that_is_none_ends_rounds_too(lr: float) -> None:
    assert qsr(alpha=1, base=2, longest=30).length(0, lr) == 30


def test_rounding_takes_no_step_from_a_whole_number() -> None:
    for tenths in range(1, 100):
        assert qsr(alpha=tenths * 0.003, base=1, longest=10**6).length(0, 0.003) == tenths**2


def test_in_the_warm_up_of_the_rate_rounds_are_short() -> None:
    rule = qsr(alpha=0.03, base=4, warmup_steps=30)
    assert [rule.length(step, 1e-4) for step in (0, 29, 30)] == [4, 4, 1000]


# --- in the loop ----------------------------------------------------------------------------------------------------


def loop(replicas: Replicas, rank: int = 0) -> LocalUpdateLoop:
    method = replicas.attached[rank].method
    assert isinstance(method, LocalUpdateLoop)
    return method


def rounds_of(replicas: Replicas, steps: int, rate: Callable[[int], float] | None = None) -> list[list[int]]:
    """After which steps each fragment was captured, within ``steps`` more; ``rate``: of the step that is made."""
    found: list[list[int]] = [[] for _ in loop(replicas).cadence.fragments]
    before = [fragment.begun for fragment in loop(replicas).cadence.fragments]
    for _ in range(steps):
        for pieces in replicas.pieces if rate is not None else ():
            pieces.optimizer.param_groups[0]["lr"] = rate(replicas.attached[0].steps)  # type: ignore[misc]
        replicas.train(1)
        for number, fragment in enumerate(loop(replicas).cadence.fragments):
            if fragment.begun != before[number]:
                found[number].append(fragment.begun)
                before[number] = fragment.begun
    return found


STREAMING = partial(streaming_diloco, layers_per_fragment=1, overlap_steps=2, compress=quantize(bits=4, block=16))
EQUAL: dict[str, tuple[Sync, Sync]] = {
    "equal lengths": (STREAMING(every_steps=lengths([4])), STREAMING(every_steps=4)),
    "a power of 1": (co2(every_steps=power(steps=12, rounds=4, power=1)), co2(every_steps=3)),
    "a constant learning rate": (  # of 0.05
        STREAMING(every_steps=qsr(alpha=0.1, base=3), first_round="early"),
        STREAMING(every_steps=4, first_round="early"),
    ),
}


@pytest.mark.parametrize("which", EQUAL)
def test_rounds_of_one_length(which: str) -> None:
    assert same_after_each_step(*EQUAL[which])


@pytest.mark.slow
@pytest.mark.parametrize("state", ["sharded", "offloaded"])
def test_a_stop_at_any_step_leaves_no_trace(state: OuterState) -> None:
    """`test_methods` tries the other methods."""
    require_no_trace(diloco(every_steps=lengths([3, 5, 2]), outer_state=state, warmup_steps=2))


@pytest.mark.parametrize("resume", [False, True])
def test_rounds_end_where_they_should(resume: bool) -> None:
    replicas = Replicas(diloco(every_steps=lengths([2, 5, 3])), 2)
    found: list[int] = []
    for _ in range(17):
        found += rounds_of(replicas, 1)[0]
        replicas = replicas.resumed() if resume else replicas
    assert found == [2, 7, 10, 13, 16]


def test_they_count_from_the_end_of_the_warm_up() -> None:
    replicas = Replicas(diloco(every_steps=lengths([2, 5, 3]), warmup_steps=4), 2)
    assert rounds_of(replicas, 14)[0][4:] == [4 + 2, 4 + 7, 4 + 10]


def test_fragments_take_turns_in_each() -> None:
    spec = streaming_diloco(every_steps=lengths([6, 9, 3]), layers_per_fragment=1, overlap_steps=0)
    assert rounds_of(Replicas(spec, 2), 18) == [[6, 15, 18], [6 + 3, 15 + 1], [6 + 6, 15 + 2]]


def test_the_rate_is_that_of_a_rounds_first_step() -> None:
    """Not of the step before it, nor of the optimizer as it was made."""
    rates = {0: 0.5, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1}
    rule = qsr(alpha=1.0, base=2, longest=7)  # 0.5: 4 steps; 0.1: 100, so 7; 1: 2
    replicas = Replicas(diloco(every_steps=rule), 2, lr=0.001)
    assert rounds_of(replicas, 16, lambda step: rates.get(step, 1.0))[0] == [4, 11, 13, 15]


def test_replicas_of_different_rates_take_the_longest_round() -> None:
    replicas = Replicas(diloco(every_steps=qsr(alpha=0.2, base=2)), 3)
    replicas.pieces[1].optimizer.param_groups[0]["lr"] = 0.1  # and the others 0.05
    replicas.train(20)
    assert {loop(replicas, rank).cadence.fragments[0].begun for rank in range(3)} == {16}
    assert all(equal(replicas.kept(rank, "anchor"), replicas.anchor) for rank in range(3))
    assert replicas.attached[0].meter.sent_as("agreement") > 0


def test_nothing_is_due_before_the_first_round() -> None:
    """What is due next is fetched ahead: within the warm-up that would be all of an offloaded state."""
    replicas = Replicas(diloco(every_steps=lengths([4]), warmup_steps=3), 1)
    for _ in range(3):
        replicas.train(1)
        assert loop(replicas).cadence.due(ahead=1) == []


@dataclass(frozen=True)
class Seen:
    """Outer SGD that writes down each round."""

    rounds: list[Round] = field(default_factory=list, compare=False, repr=False)

    @property
    def kinds(self) -> dict[str, Kind]:
        return {}

    def step(self, fqn: str, anchor: Tensor, delta: Tensor, state: State, now: Round = PLAIN) -> Tensor:
        if fqn == "layers.0.weight":
            self.rounds.append(now)
        return anchor - delta


@pytest.mark.parametrize("fragments", [0, 1])
def test_an_outer_optimizer_sees_the_real_length_of_each_round(fragments: int) -> None:
    seen = Seen()
    spec = streaming_diloco(
        every_steps=lengths([4, 7, 5]), layers_per_fragment=fragments, overlap_steps=2, outer=seen, warmup_steps=3
    )
    replicas = Replicas(spec, 1)
    replicas.train(3 + 4 + 2 + 3)
    replicas = replicas.resumed()
    replicas.train(6)
    replicas.attached[0].close_round()
    assert [now.every_steps for now in seen.rounds] == [4, 7, 4]  # training ended in the last of them
    assert all(now.inner_lr == pytest.approx(0.05) for now in seen.rounds)


def test_so_it_does_where_rounds_have_one_length_and_training_ends_in_one() -> None:
    seen = Seen()
    replicas = Replicas(local_update(every_steps=4, outer=seen), 1)
    replicas.train(10)
    replicas.attached[0].close_round()
    assert [now.every_steps for now in seen.rounds] == [4, 4, 2]


def test_one_that_is_closed_early_moves_no_later_one() -> None:
    replicas = Replicas(diloco(every_steps=lengths([4, 6])), 2)
    replicas.train(6)
    assert replicas.all(lambda rank: replicas.attached[rank].close_round()) == [True, True]
    assert rounds_of(replicas, 12)[0] == [10, 16]


def test_a_delayed_method_applies_at_the_end_of_the_next_round() -> None:
    replicas = Replicas(co2(every_steps=lengths([2, 5, 3])), 2)
    changed, before = [], replicas.anchor
    for step in range(1, 12):
        replicas.train(1)
        if not equal(replicas.anchor, before):
            changed.append(step)
        before = replicas.anchor
    assert changed == [7, 10]


def test_directions_are_per_rate_whatever_the_length() -> None:
    replicas = Replicas(fedavg_m(every_steps=lengths([2, 5, 3])), 2)
    assert rounds_of(replicas, 12)[0] == [2, 7, 10]


# --- bad input ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong(RoundLengths):
    """Of a user: lengths that are none."""

    given: object

    def length(self, step: int, lr: float) -> int:
        return 3 if step == 0 else self.given  # type: ignore[return-value]


@pytest.mark.parametrize("length", [0, -4, 2.5, None, "auto", True, 10**30])
def test_a_length_that_is_none_is_refused_on_all_replicas(length: object) -> None:
    replicas = Replicas(diloco(every_steps=Wrong(length)), 2)
    replicas.train(3)
    with pytest.raises(ValueError, match=re.escape(f"asked for a round of {length!r} steps (all replicas: ")):
        replicas.train(1)


@dataclass(frozen=True)
class WrongAt(RoundLengths):
    """Of a user: no length at some rate."""

    rate: float

    def length(self, step: int, lr: float) -> int:
        return 0 if lr == self.rate else 3


def test_where_one_replica_has_no_length_all_stop() -> None:
    replicas = Replicas(diloco(every_steps=WrongAt(0.7)), 2)
    replicas.train(3)
    replicas.pieces[1].optimizer.param_groups[0]["lr"] = 0.7

    def stopped(rank: int) -> bool:
        with pytest.raises(ValueError, match=re.escape("(all replicas: [3, 0])")):
            replicas._train(rank, 1)
        return True

    assert replicas.all(stopped) == [True, True]


class Duck:
    """No `RoundLengths`, though it has a length."""

    def length(self, step: int, lr: float) -> int:
        return 3


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: lengths([]), "each is []; give the steps of every round"),
    (lambda: lengths("345"), "each is '345'; give the steps of every round"),  # type: ignore[arg-type]
    (lambda: lengths([5, 0, 5]), "each[1] is 0; every round has a positive whole number of inner steps"),
    (lambda: lengths([5, 8, -2]), "each[2] is -2;"),
    (lambda: lengths([5, 2.5]), "each[1] is 2.5;"),  # type: ignore[list-item]
    (lambda: lengths([True]), "each[0] is True;"),
    (lambda: power(steps=0, rounds=1, power=1), "steps is 0; give a positive whole number"),
    (lambda: power(steps=10, rounds=0, power=1), "rounds is 0;"),
    (lambda: power(steps=10, rounds=11, power=1), "10 steps cannot be cut into 11 rounds"),
    (lambda: power(steps=10, rounds=2, power=1, at_least=11), "into 2 rounds of at least 11 steps"),
    (lambda: power(steps=10, rounds=2, power=0), "power is 0; give a positive number"),
    (lambda: power(steps=10, rounds=2, power=-1.5), "power is -1.5;"),
    (lambda: power(steps=10, rounds=2, power=math.inf), "power is inf;"),
    (lambda: power(steps=10, rounds=2, power=math.nan), "power is nan;"),
    (lambda: qsr(alpha=0, base=4), "alpha is 0; give a positive number"),
    (lambda: qsr(alpha=math.inf, base=4), "alpha is inf;"),
    (lambda: qsr(alpha=0.1, base=0), "base is 0;"),
    (lambda: qsr(alpha=0.1, base=10, longest=9), "longest is 9; give a whole number of steps, at least base"),
    (lambda: qsr(alpha=0.1, base=10, longest=math.inf), "longest is inf;"),  # type: ignore[arg-type]
    (lambda: qsr(alpha=0.1, base=10, warmup_steps=-1), "warmup_steps is -1;"),
    (lambda: diloco(every_steps=Duck()), "a round has a positive whole number of inner steps, or 'auto'; rounds of"),  # type: ignore[arg-type]
    (lambda: diloco(every_steps=[5, 10]), "every_steps is [5, 10];"),  # type: ignore[arg-type]
    (lambda: diloco(every_steps=power), "rounds of changing length are in dtrain.rounds"),  # type: ignore[arg-type]
    (
        lambda: streaming_diloco(every_steps=lengths([5, 2, 9]), overlap_steps=2),
        "overlap_steps is 2 with rounds of at least 2 steps: what is under way must arrive before",
    ),
    (
        lambda: streaming_diloco(every_steps=lengths([50]), layers_per_fragment="auto"),
        "'auto' chooses an overlap and fragments for rounds of one length",
    ),
    (lambda: streaming_diloco(every_steps=lengths([50]), overlap_steps="auto"), "give overlap_steps and layers_per"),
    (lambda: require_elastic(diloco(every_steps=qsr(alpha=0.1, base=4))), "rounds whose length follows from the"),
    (lambda: fedavg_m(every_steps="auto"), "every_steps is 'auto'; give a whole number of steps, or rounds of"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_lengths_that_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_fragments_need_a_step_each() -> None:
    spec = streaming_diloco(every_steps=lengths([2, 9]), layers_per_fragment=1, overlap_steps=1)
    with pytest.raises(ValueError, match="3 fragments take turns in a round, and the shortest of"):
        Replicas(spec, 1)
    Replicas(streaming_diloco(every_steps=lengths([2, 9]), layers_per_fragment=1, staggered=False), 1).train(12)


def test_members_may_have_lengths_that_follow_from_the_step() -> None:
    require_elastic(diloco(every_steps=power(steps=100, rounds=10, power=1.5)))
    require_elastic(diloco(every_steps=lengths([3, 4])))


def cycles(begun: int, steps: int) -> dict[str, int]:
    return {"cycle.begun": begun, "cycle.steps": steps}


@pytest.mark.parametrize("changed", [cycles(9, 4), cycles(4, -4), cycles(2, 1)], ids=["late", "backwards", "over"])
def test_a_state_whose_round_is_not_that_of_its_step_is_refused(changed: dict[str, int]) -> None:
    replicas = Replicas(local_sgd(every_steps=lengths([2, 5, 3])), 1)
    replicas.train(5)
    (name, entries), *_ = replicas.attached[0].state_dict().items()
    numbers = cast("dict[str, int]", entries["numbers"])  # type: ignore[index]
    assert {key: numbers[key] for key in changed} == cycles(2, 5)
    other = Replicas(replicas.spec, 1)
    other.pieces[0].write(replicas.live(0))
    with pytest.raises(ValueError, match=r"is of step 5 of rounds, and says that its round began after step"):
        other.attached[0].load_state_dict({name: {**entries, "numbers": {**numbers, **changed}}})  # type: ignore[dict-item]


def test_a_state_of_other_lengths_is_refused_and_may_be_taken_nevertheless() -> None:
    saved, loaded = Replicas(diloco(every_steps=4), 1), Replicas(diloco(every_steps=lengths([4, 9])), 1)
    saved.train(6)
    loaded.pieces[0].write(saved.live(0))
    state = saved.attached[0].state_dict()
    ((name, entries),) = state.items()
    with pytest.raises(ValueError, match=r"lengths=Lengths\(each=\(4, 9\)\)"):
        loaded.attached[0].load_state_dict(state)
    loaded.attached[0].load_state_dict({name: {**cast("dict[str, object]", entries), "sync": None}})
    assert rounds_of(loaded, 12)[0] == [6 + 9]  # as [4, 9] has it from step 6 on
