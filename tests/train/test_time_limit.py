"""The time limit as a run sees it from inside: when it leaves, before and after its first checkpoint."""

from __future__ import annotations

import pytest

from dtrain.errors import ConfigError
from dtrain.train.time_limit import MARGIN_SECONDS, SLOW_DISK, Clock


def test_without_a_limit_it_is_never_due() -> None:
    clock = Clock.from_environment({})
    clock.expect_checkpoint(10**15)
    assert not clock.due(1e9) and clock.checkpoint_seconds == 0.0


def test_before_a_checkpoint_has_been_timed_a_slow_disk_is_assumed_but_at_most_a_tenth_of_the_limit() -> None:
    clock = Clock(1000.0)
    assert not clock.due(985.0)
    clock.expect_checkpoint(int(20 * SLOW_DISK))
    assert clock.due(955.0) and not clock.due(945.0)  # twice 20 s, beside the margin
    clock.expect_checkpoint(10**15)
    assert clock.due(895.0) and not clock.due(885.0)
    clock.checkpoint_seconds = 1.0  # timed
    assert not clock.due(980.0)


def test_a_limit_too_short_for_a_step_is_refused_before_the_first() -> None:
    clock = Clock(MARGIN_SECONDS)
    with pytest.raises(ConfigError, match=r"leaves 10 s, .* set a longer launcher\.minutes"):
        clock.check()
