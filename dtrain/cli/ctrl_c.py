"""Messages to a person who ends a run by Ctrl-C: what happens now, and then where the run can resume."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.cli.resume_hint import command, last_checkpoint
from dtrain.launchers.exit_codes import INTERRUPTED

if TYPE_CHECKING:
    from dtrain.launchers.failure import Failure
    from dtrain.report.progress import Progress
    from dtrain.train.config import Config

STOPPING = "stopping: a checkpoint is written at the next step that all ranks agree on, if they have begun to train"
SAME_PRESS_SECONDS = 0.5  # a terminal, a shell and a wrapper may each pass on the one Ctrl-C


class Stopping:
    """For `dtrain.train.signals.overheard`: reports what a stop signal does, and ends everything at the second Ctrl-C.

    The workers get the first one from `dtrain.launchers.elastic_agent`, which ignores later ones; ending this process
    ends them too (see ``die_with_parent``), and checkpoints are crash-safe.
    """

    def __init__(self, config: Config, words: Sequence[str], progress: Progress) -> None:
        self._config, self._words, self._progress = config, words, progress
        self._since: float | None = None

    def __call__(self, number: int) -> None:
        """A signal came."""
        if self._since is None:
            self._since = time.monotonic()
            step = last_checkpoint(self._config)
            hint = "there is no checkpoint yet" if step is None else f"the last checkpoint is step {step}"
            self._progress.say(f"{signal.Signals(number).name}: {STOPPING}; Ctrl-C again ends at once ({hint})")
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_PRESS_SECONDS:
            self._progress.close()
            print(f"SIGINT again: ended at once; {goes_on_from(self._config, self._words)}", flush=True)
            sys.stderr.flush()
            os._exit(INTERRUPTED)  # the main thread waits for the workers, which would continue otherwise


def goes_on_from(config: Config, words: Sequence[str]) -> str:
    """Where the same command resumes, and the command."""
    step = last_checkpoint(config)
    where = "there is no checkpoint, so the same command starts from step 0"
    if step is not None:
        where = f"the same command goes on from step {step}"
    elif config.run.resume not in ("auto", "never"):
        where = f"the same command starts from {config.run.resume} again"
    return f"{where}:\n  {command(words, config)}"


def interruption(failure: Failure) -> bool:
    """Whether a rank failed only by the Ctrl-C, which came before it watched for signals."""
    return failure.signal == "SIGINT" or failure.message.startswith("KeyboardInterrupt")
