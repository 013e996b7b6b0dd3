"""Knobs that are chosen: by the rule from what was measured, alike on all replicas, and as if they had been given."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain import co2, diloco, local_sgd, local_update, streaming_diloco
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.runtime.autotune import Choosing
from dtrain.comm.runtime.fragments import Fragments
from dtrain.comm.runtime.knobs import LEAST_STEPS, MOST_STEPS, Auto, Knobs, Measured, choose, fitted
from dtrain.comm.runtime.loop import LocalUpdateLoop
from dtrain.comm.runtime.loop_spec import LoopSpec
from dtrain.compress import error_feedback, quantize
from dtrain.outer import sgd
from dtrain.testing.replicas import Replicas, equal
from tests.comm.zoo import draw

BLOCKS = {f"blocks.{number}.weight": (100,) for number in range(12)}
WHOLE = Knobs(LEAST_STEPS, 0, 0.0, Fragments())
SECONDS = st.floats(1e-3, 100.0)


# --- the rule -------------------------------------------------------------------------------------------------------


@given(step=SECONDS, exchange=SECONDS, asked=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_without_overlap_a_round_is_as_short_as_the_utilization_allows(
    step: float, exchange: float, asked: float
) -> None:
    found = Measured(step, 0.0, exchange, 1)
    knobs, why = choose(Auto(asked, every_steps=True), WHOLE, found, BLOCKS, whole_round=False)

    def utilization(steps: int) -> float:
        return steps * step / (steps * step + exchange)

    assert LEAST_STEPS <= knobs.every_steps <= MOST_STEPS
    assert utilization(knobs.every_steps) >= asked - 1e-9 or knobs.every_steps == MOST_STEPS
    assert knobs.every_steps == LEAST_STEPS or utilization(knobs.every_steps - 1) < asked
    assert knobs.overlap_steps == 0 and f"every_steps={knobs.every_steps}" in why


@given(step=SECONDS, exchange=SECONDS)
def test_what_overlaps_is_as_large_as_five_steps_hide(step: float, exchange: float) -> None:
    asked = Knobs(LEAST_STEPS, 1, 0.0, Fragments(1, auto=True))
    auto = Auto(0.95, every_steps=True, overlap_steps=True, mix=True, fragments=True)
    knobs, _ = choose(auto, asked, Measured(step, 0.0, exchange, 1), BLOCKS, whole_round=False)
    count = len(knobs.fragments.cut(BLOCKS))
    largest = exchange * max(len(part) for part in knobs.fragments.cut(BLOCKS)) / len(BLOCKS)
    assert 1 <= knobs.overlap_steps <= 5 and knobs.mix == (0.5 if knobs.overlap_steps > 1 else 0.0)
    exposed = max(0.0, largest - knobs.overlap_steps * step)
    assert exposed < 1e-9 or count == len(BLOCKS)
    round_seconds = knobs.every_steps * step
    assert knobs.every_steps == MOST_STEPS or exchange <= 0.8 * round_seconds * (1 + 1e-9)
    assert knobs.every_steps == MOST_STEPS or round_seconds >= 0.95 * (round_seconds + exposed) * (1 - 1e-9)


def test_a_whole_round_hides_its_exchange() -> None:
    knobs, why = choose(Auto(0.95, every_steps=True), WHOLE, Measured(0.5, 0.0, 8.0, 1), BLOCKS, whole_round=True)
    assert (knobs.every_steps, knobs.overlap_steps) == (20, 20) and "hides" in why


def test_what_was_given_stays() -> None:
    asked = Knobs(6, 1, 0.25, Fragments(1))
    knobs, _ = choose(Auto(0.95, overlap_steps=True), asked, Measured(1.0, 0.0, 600.0, 1), BLOCKS, whole_round=False)
    assert knobs == Knobs(6, 5, 0.25, Fragments(1))


def test_two_trials_make_a_line() -> None:
    found = fitted(1.0, [(1000, 0.3), (9000, 1.1)], 100_000)
    assert found.exchange(1.0) == pytest.approx(0.2 + 10.0) and found.exchange(0.5) == pytest.approx(0.2 + 5.0)
    for trials in ([(1000, 0.3), (1000, 0.5)], [(1000, 0.9), (9000, 0.9)]):
        assert fitted(1.0, trials, 9000).exchange(1.0) == pytest.approx(0.9 * 9000 / trials[1][0] / 0.9 * trials[1][1])


# --- in the loop ----------------------------------------------------------------------------------------------------

START = {f"blocks.{number}.weight": draw(number, 50) for number in range(4)}
EF4 = error_feedback(quantize(bits=4, block=16))


def chosen(replicas: Replicas) -> list[LoopSpec]:
    found: list[LoopSpec] = []
    for attached in replicas.attached:
        assert isinstance(attached.method, LocalUpdateLoop)
        found.append(replace(attached.method.spec, **vars(attached.method.cadence.knobs)))
    return found


def measured(monkeypatch: pytest.MonkeyPatch, exchange: float) -> None:
    monkeypatch.setattr(Choosing, "_measured", lambda *_: Measured(1.0, 0.0, exchange, 1))


AUTOMATIC: dict[str, tuple[LocalUpdate, LocalUpdate]] = {
    "diloco": (diloco(every_steps="auto", utilization=0.9, compress=EF4), diloco(every_steps=18, compress=EF4)),
    "streaming_diloco": (
        streaming_diloco(every_steps="auto", overlap_steps="auto", layers_per_fragment="auto", compress=EF4),
        streaming_diloco(every_steps=10, overlap_steps=2, layers_per_fragment=4, compress=EF4),
    ),
    "co2": (co2(every_steps="auto"), co2(every_steps=10)),
    "sharded": (
        local_sgd(every_steps="auto", utilization=0.9, outer_state="sharded"),
        local_sgd(every_steps=18, outer_state="sharded"),
    ),
}


@pytest.mark.parametrize("name", AUTOMATIC)
def test_chosen_is_as_given_and_a_stop_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 2.0)
    automatic, given_ones = (Replicas(spec, 2, start=START) for spec in AUTOMATIC[name])
    for steps in (12, 7, 9, 10):
        automatic.train(steps)
        given_ones.train(steps)
        assert all(equal(automatic.live(rank), given_ones.live(rank)) for rank in range(2))
        automatic = automatic.resumed()
    for found, wanted in zip(chosen(automatic), chosen(given_ones), strict=True):
        assert (found.every_steps, found.overlap_steps, found.mix) == (
            wanted.every_steps, wanted.overlap_steps, wanted.mix,
        )  # fmt: skip
        assert found.fragments.layers == wanted.fragments.layers


def test_what_was_not_chosen_yet_is_chosen_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 2.0)
    replicas = Replicas(AUTOMATIC["diloco"][0], 2, start=START)
    replicas.train(5)
    again = replicas.resumed()
    again.train(8)
    assert again.attached[0].decisions == [] and again.attached[0].meter.sent_as("round") == 0
    again.train(5)
    assert [spec.every_steps for spec in chosen(again)] == [18, 18]
    assert again.attached[0].meter.sent_as("round") > 0


def test_all_replicas_choose_alike_from_what_they_measure_and_say_why() -> None:
    spec = streaming_diloco(every_steps="auto", overlap_steps="auto", layers_per_fragment="auto", compress=EF4)
    replicas = Replicas(spec, 3, start=START)
    replicas.train(12)
    first, *others = chosen(replicas)
    assert all(other.knobs == first.knobs for other in others)
    assert LEAST_STEPS <= first.every_steps <= MOST_STEPS
    for attached in replicas.attached:
        (why,) = attached.decisions
        assert f"every_steps={first.every_steps}" in why and "compute utilization" in why
        assert attached.meter.sent_as("trial") > 0


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: diloco(every_steps="often"), "every_steps is 'often'; a round has a positive whole number"),  # type: ignore[arg-type]
    (lambda: diloco(every_steps="auto", utilization=1.0), "utilization is 1.0; it lies between 0 and 1"),
    (lambda: streaming_diloco(every_steps=1, overlap_steps="auto"), "overlap_steps is 1 with every_steps=1"),
    (
        lambda: streaming_diloco(layers_per_fragment="auto", fragments_by_name=[["a"], ["b"]]),
        "the fragments are named by hand",
    ),
    (
        lambda: local_update(every_steps=5, outer=sgd(), delay="stale", overlap_steps="auto"),
        "only every_steps can be 'auto'",
    ),
    (
        lambda: local_update(every_steps=5, outer=sgd(), overlap_steps="auto", outer_state="sharded"),
        "outer_state='sharded' does not overlap rounds",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_cannot_be_chosen_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_model_without_blocks_has_no_fragments_to_choose() -> None:
    with pytest.raises(ValueError, match="counts numbered blocks"):
        Replicas(streaming_diloco(layers_per_fragment="auto"), 1, start={"weight": draw(0, 5)})
