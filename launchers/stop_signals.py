"""The signals that ask a job to end, and the first of them, noted."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["OF_A_RANK", "STOP_SIGNALS", "FirstSignal", "passed_on"]

# SIGCONT is none of them: Slurm sends it together with SIGTERM, and alone it means nothing.
OF_A_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Those that a rank handles."""
STOP_SIGNALS = (*OF_A_RANK, signal.SIGHUP)
"""Those that launchers understand: a terminal that is closed sends SIGHUP."""


def passed_on(number: int) -> signal.Signals:
    """What the ranks are sent for a stop signal: SIGTERM for SIGHUP, else the same."""
    return signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)


class FirstSignal:
    """Context manager: ``number`` is 0, or that of the first stop signal that came within the block.

    It only records the number, so that no exception can interrupt other code. SIGHUP stays ignored under nohup.
    ``restored``: further signals whose handlers are put back at the end, as code in the block replaces them.
    """

    def __init__(self, *restored: signal.Signals) -> None:
        self.number = 0
        self._restored = restored
        self._old: dict[int, object] = {}

    def __enter__(self) -> FirstSignal:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._note)
        self._old |= {number: signal.getsignal(number) for number in self._restored}
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
