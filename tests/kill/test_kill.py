"""Some runs killed at random and resumed; ``make kill`` does a hundred."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import pytest

from dtrain.testing.workers import Forked
from tests.kill.runs import ENGINES, MEMBERS, SYNCS, Setting, disturbed, plan, undisturbed, write_text
from tests.sync_words import sync_words


@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize("setting", [Setting("fsdp", "streaming_diloco"), Setting("ddp", MEMBERS)], ids=str)
def test_a_run_that_is_killed_at_random_ends_as_one_that_nobody_touched(setting: Setting, tmp_path: Path) -> None:
    # In a process that has done nothing but imports: ranks are forked off it, and threads that other tests have left in
    # this one, or their process groups, do not survive that.
    process = Forked(tried, setting, tmp_path)
    try:
        assert process.wait(170) == 0, (tmp_path / "result").read_text()
    finally:
        process.kill()


def tried(setting: Setting, folder: Path) -> None:
    """Exit with 0 if the disturbed run ends as the undisturbed one; says in a file what happened."""
    try:
        text = write_text(folder / "text")
        expected = undisturbed(folder / "undisturbed", setting, text)
        result = disturbed(folder / "disturbed", setting, text, expected=expected, seed="1", count=2)
    except Exception:
        (folder / "result").write_text(traceback.format_exc())
        raise
    (folder / "result").write_text(str(result))
    sys.exit(0 if result.equal and result.attempts.disturbances >= 1 else 1)


def test_a_hundred_runs_cover_every_sync_and_every_engine() -> None:
    settings = plan(100)
    assert {setting.sync for setting in settings} == {*SYNCS, MEMBERS}
    assert {setting.engine for setting in settings} == set(ENGINES)
    assert any(setting.shards == 2 for setting in settings)


def test_every_sync_that_can_be_chosen_is_killed() -> None:
    configs = Path(__file__).parents[2] / "configs" / "sync"
    chosen = {sync_words(name)[0].removeprefix("sync=") for name in SYNCS}
    assert {path.stem for path in configs.glob("*.yaml")} == chosen
