"""The pages of `make fuzz` and `make kill`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import damaged_inputs, kill_and_resume
from tests.fuzz.harness import Counts
from tests.fuzz.targets import TARGETS
from tests.kill.harness import Attempts
from tests.kill.runs import Result, Setting


def test_a_page_says_which_digest_differs() -> None:
    fine = Result(Setting("ddp", "dense"), Attempts(True, 2, ("all at 5", "attempt 0: [-9, -9]")), True)
    wrong = Result(Setting("zero1", "co2"), Attempts(True, 1, ("term at 10",)), False)
    made = kill_and_resume.report([fine, wrong], "make kill")
    assert "| zero1 co2 2x1 | term at 10 | **DIFFERENT** |" in made.body
    assert [check.met for check in made.checks] == [False, True]


def test_a_page_is_made_of_what_was_counted() -> None:
    counts = damaged_inputs.merged([Counts(inputs=3, read=3), Counts(inputs=2, refused=2)])
    made = damaged_inputs.report({"t": damaged_inputs.row(counts, "abc")}, "make fuzz")
    assert "| t | 5 | 2 | 3 | 0 |" in made.body and all(check.met for check in made.checks)
    bad = Counts(inputs=1)
    bad.failures["KeyError at x.py:1"] = 1
    rows = {"t": damaged_inputs.row(bad, "abc")}
    assert not all(check.met for check in damaged_inputs.report(rows, "make fuzz").checks)


def test_one_parser_tried_again_leaves_the_rows_of_the_others(tmp_path: Path) -> None:
    name, other = TARGETS[0].name, TARGETS[1].name
    tried = damaged_inputs.row(Counts(inputs=2, read=2), "earlier")
    figures = {name: {**tried, "inputs": 1}, other: tried, "a parser that is gone": tried}
    (tmp_path / "fuzz.json").write_text(json.dumps({"made": {"revision": "the page's"}, "figures": figures}))
    rows = damaged_inputs.rows_of(tmp_path / "fuzz.json")
    assert list(rows) == [name, other] and rows[other] == tried
    again = {name: tried, other: {k: v for k, v in tried.items() if k != "made_at"}}
    (tmp_path / "fuzz.json").write_text(json.dumps({"made": {"revision": "the page's"}, "figures": again}))
    assert damaged_inputs.rows_of(tmp_path / "fuzz.json")[other]["made_at"] == "the page's"
