"""Some runs killed at random and resumed; ``make kill`` does a hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill.__main__ import report
from tests.kill.harness import Attempts
from tests.kill.runs import ENGINES, MEMBERS, SYNCS, Result, Setting, disturbed, plan, undisturbed, write_text


@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize("setting", [Setting("fsdp", "streaming_diloco"), Setting("ddp", MEMBERS)], ids=str)
def test_a_run_that_is_killed_at_random_ends_as_one_that_nobody_touched(setting: Setting, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    expected = undisturbed(tmp_path / "undisturbed", setting, text)
    result = disturbed(tmp_path / "disturbed", setting, text, expected=expected, seed="1", count=2)
    assert result.equal and result.attempts.disturbances >= 1, result.attempts.history


def test_a_hundred_runs_cover_every_sync_and_every_engine() -> None:
    settings = plan(100)
    assert {setting.sync for setting in settings} == {*SYNCS, MEMBERS}
    assert {setting.engine for setting in settings} == set(ENGINES)
    assert any(setting.shards == 2 for setting in settings)


def test_every_sync_that_can_be_chosen_is_killed() -> None:
    configs = Path(__file__).parents[2] / "configs" / "sync"
    assert {path.stem for path in configs.glob("*.yaml")} == set(SYNCS)


def test_a_page_says_which_digest_differs() -> None:
    fine = Result(Setting("ddp", "dense"), Attempts(True, 2, ("all at 5", "attempt 0: [-9, -9]")), True)
    wrong = Result(Setting("zero1", "co2"), Attempts(True, 1, ("term at 10",)), False)
    made = report([fine, wrong], "make kill")
    assert "| zero1 co2 2x1 | term at 10 | **DIFFERENT** |" in made.body
    assert [check.met for check in made.checks] == [False, True]
