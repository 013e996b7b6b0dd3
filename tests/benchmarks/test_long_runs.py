"""The pages of `make fuzz` and `make kill`."""

from __future__ import annotations

from benchmarks import damaged_inputs, kill_and_resume
from tests.fuzz.harness import Counts
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
    made = damaged_inputs.report({"t": counts}, "make fuzz")
    assert "| t | 5 | 2 | 3 | 0 |" in made.body and all(check.met for check in made.checks)
    bad = Counts(inputs=1)
    bad.failures["KeyError at x.py:1"] = 1
    assert not all(check.met for check in damaged_inputs.report({"t": bad}, "make fuzz").checks)
