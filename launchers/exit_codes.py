"""What exit codes mean to dtrain: of a rank, of a job, and of the command line, which are the same.

0     finished, or stopped as asked
1     failed; started again it may succeed
2     a wrong configuration, or an error that would recur; a shell's 126 and 127, for no program, count as 2
75    asked to stop, by a signal or near the time limit; with a checkpoint unless there was no time: run it again
130   ended by the user, after a checkpoint
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BAD_CONFIG", "RUN_AGAIN", "ENDED_WELL", "ENDINGS", "FAILED", "FINISHED", "INTERRUPTED", "NEVER_AGAIN",
    "of_process", "verdict",
]  # fmt: skip

FINISHED, FAILED, BAD_CONFIG, RUN_AGAIN, INTERRUPTED = 0, 1, 2, 75, 130
NO_PROGRAM = (126, 127)
"""Exit codes of a shell that cannot start a program."""

ENDED_WELL = (FINISHED, RUN_AGAIN, INTERRUPTED)
NEVER_AGAIN = (BAD_CONFIG, *NO_PROGRAM)
"""A rank that exits so would do so again."""

ENDINGS = {
    FINISHED: "finished", BAD_CONFIG: "it cannot run, or would fail in the same way again",
    RUN_AGAIN: "stopped as asked, to be run again", INTERRUPTED: "ended by the user",
}  # fmt: skip
"""How a job with this exit code has ended, in words; it failed with any other."""


def of_process(returncode: int) -> int:
    """The exit code that a shell would give for what ``subprocess`` reports, -N for signal N.

    >>> of_process(3), of_process(-9)
    (3, 137)
    """
    return returncode if returncode >= 0 else 128 - returncode


def verdict(codes: Sequence[int | None], workers: int) -> int:
    """The exit code of a job of ``workers`` ranks, by those of the ranks that have ended; None: killed by a signal.

    2 or 130 if any rank says so, 0 or 75 if all do, else 1.

    >>> verdict([0, 75], 2), verdict([0], 2), verdict([1, 127], 2), verdict([1, 130], 2)
    (75, 1, 2, 130)
    """
    if {*NEVER_AGAIN} & {*codes}:
        return BAD_CONFIG
    if INTERRUPTED in codes:
        return INTERRUPTED
    if len(codes) == workers and {*codes} <= {FINISHED, RUN_AGAIN}:
        return RUN_AGAIN if RUN_AGAIN in codes else FINISHED
    return FAILED
