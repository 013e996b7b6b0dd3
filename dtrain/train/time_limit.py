"""The scheduler's time limit, watched from inside: a run checkpoints before it, whether or not a signal comes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping

from dtrain.errors import ConfigError
from dtrain.launchers.environment import SECONDS_LEFT

__all__ = ["TIME_LIMIT", "Clock"]

TIME_LIMIT = int(signal.SIGXCPU)
"""Stands for the time limit among the signals that end a run."""

MARGIN_SECONDS = 10.0  # to notice, to agree on a step, to leave
SLOW_DISK = 100e6
"""Bytes per second at which the first checkpoint is expected to be written, before one has been timed."""


class Clock:
    """``due`` says when it is time to checkpoint and leave; without a time limit, never."""

    def __init__(self, seconds_left: float | None) -> None:
        self._end = None if seconds_left is None else time.monotonic() + seconds_left
        self._seconds_left = seconds_left
        self.checkpoint_seconds = 0.0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Clock:
        """With the time that the launcher says is left, if it says so."""
        text = variables.get(SECONDS_LEFT, "")
        return cls(float(text) if text.isdecimal() else None)

    def expect_checkpoint(self, bytes_of_state: int) -> None:
        """Before any checkpoint has been timed: assume a slow disk, but hold back at most a tenth of the limit."""
        if self._seconds_left is not None:
            self.checkpoint_seconds = min(bytes_of_state / SLOW_DISK, self._seconds_left / 20)

    def due(self, seconds_between: float) -> bool:
        """Whether to stop now, if the next chance comes in ``seconds_between``. A checkpoint may take twice as long as
        the longest so far.
        """
        if self._end is None:
            return False
        return time.monotonic() + seconds_between + 2 * self.checkpoint_seconds + MARGIN_SECONDS > self._end

    def check(self) -> None:
        """Raise ``ConfigError`` if the limit leaves no time for a single step and its checkpoint."""
        if self.due(0.0):
            raise ConfigError(
                f"the time limit leaves {self._seconds_left:.0f} s, but to checkpoint and leave in time takes "
                f"{2 * self.checkpoint_seconds + MARGIN_SECONDS:.0f} s; set a longer launcher.minutes"
            )
