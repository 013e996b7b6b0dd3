"""The pages that follow the table of all syncs: which rows are tuned, and what the lines are held to."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.best_six import (
    LEAST,
    NUMBER,
    OTHERWISE,
    RATE,
    Tuning,
    best_six_report,
    candidates,
    equal_time_report,
    six,
)
from benchmarks.few_bytes import ADAMW, ALONE, COMMON, EVERY_SYNC, MUON, SEEDS, at_defaults
from benchmarks.harness import Run
from benchmarks.time_to_loss import (
    BASE,
    LENGTHS,
    LINKS,
    LOW_RANK,
    ROWS,
    Reached,
    small_model_report,
    time_to_loss_report,
    with_steps,
)
from dtrain.train.config import compose
from tests.benchmarks.test_page import missed, run


def took(seconds: float) -> Run:
    made = run(last=1.9)
    return dataclasses.replace(made, summary=dataclasses.replace(made.summary, seconds=seconds))


def test_the_six_are_the_lowest_of_those_that_send_little() -> None:
    runs = {(f"s{number}", "Muon"): run(last=2 + number, sent=4000 // LEAST) for number in range(8)}
    runs["dense", "Muon"] = run(last=1.0, sent=4000)
    assert six(runs) == [(f"s{number}", "Muon") for number in range(NUMBER)]


def test_every_sync_has_as_many_candidates() -> None:
    assert {len(set(candidates(name))) for name in (*EVERY_SYNC, *OTHERWISE)} == {4}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_candidate_can_be_composed() -> None:
    for inside, alone in ALONE.items():
        for name in (*EVERY_SYNC, *alone):
            for words in candidates(name):
                compose(["run.dir=x", *COMMON, "data.part=tuning", *at_defaults(name, inside), *words])


def test_the_page_of_the_six_shows_what_was_tried() -> None:
    words = candidates("diloco")
    tuning = Tuning({"a": ("sync=diloco",)}, {"a": {words[0]: [1.0, 1.0], words[1]: [2.0]}}, {"a": words[0]})
    assert tuning.words("a") == ("sync=diloco", *words[0])
    report = best_six_report(tuning, {name: [run(last=2.0)] * len(SEEDS) for name in (ADAMW, MUON, "a")})
    assert "| a | 2.0000 ± 0.0000 | +0.00 % ± 0.00 |" in report.body
    assert "chosen |" in report.body


def test_equal_time_is_told_in_steps_and_loss() -> None:
    report = equal_time_report(run(last=2.0), {"a": run(last=1.0)})
    assert RATE in report.body and "| a | 300 | 10.0 s | 1.0000 | -50.0% |" in report.body


@pytest.mark.parametrize(("seconds", "lines"), [(10.0, 0), (10.1, 1)])
def test_the_line_is_against_the_faster_of_both(seconds: float, lines: int) -> None:
    times = {BASE: 200.0, LOW_RANK: 100.0, ROWS[0]: seconds, ROWS[1]: 99.0}
    lengths = {name: Reached({LENGTHS[name][0]: run(last=1.9)}, LENGTHS[name][0]) for name in LENGTHS}
    report = time_to_loss_report(2.0, lengths, {(rate, name): took(t) for rate in LINKS for name, t in times.items()})
    assert len(missed(report)) == lines


def test_a_row_that_never_gets_there_is_named() -> None:
    lengths = {name: Reached({1000: run(last=2.5)}, 0) for name in LENGTHS}
    report = time_to_loss_report(2.0, lengths, {(rate, BASE): took(10.0) for rate in LINKS})
    assert [check for check in report.checks if LOW_RANK in check.found and not check.met]


def test_the_larger_model_says_the_order() -> None:
    losses = {ADAMW: 2.0, MUON: 1.8, ROWS[0]: 1.9, ROWS[1]: 2.1}
    report = small_model_report({name: run(last=loss) for name, loss in losses.items()})
    assert f"By loss: {MUON} < {ROWS[0]} < {ADAMW} < {ROWS[1]}." in report.body
    for words in (("sync=muloco",), ("sync=dense",)):
        compose(["run.dir=x", *COMMON, "data.part=tuning", "model=small", "optim=muon", *with_steps(words, 200)])
