"""Every error that dtrain raises on purpose. Each says what was wrong, with values, and what to do.

    DtrainError                     exit code
    ├── ConfigError                     2   nothing was launched; if a worker raises it, it is not restarted
    │   ├── DataError                   2   a data folder or file that is missing, empty or not what it says
    │   ├── ResumeError                 2   the stored run and the one asked for do not go together
    │   ├── ModelError                  2   a model that does not return a scalar loss
    │   └── FailedAtTheStart            2   anything else that went wrong before the first step was done
    ├── CheckpointError                 1   a checkpoint that is damaged, incomplete or of another model
    ├── WouldRecur                      2   it would fail in the same way again, so it is not restarted
    │   ├── TooManySkippedSteps         2   NaN or Inf in the gradients, more often than train.max_skipped_steps allows
    │   ├── NotFinite                   2   NaN or Inf in what a checkpoint would hold
    │   └── FailedTwice                 2   the same error at the same step, also after a restart
    └── WorkerFailed                    1   a worker process died and the restarts are used up

``exit_code`` is what the command ``dtrain`` returns for the error, and by what every launcher decides on a restart:
after 2 none restarts. Two further codes are no errors: ``RUN_AGAIN`` (stopped after a signal from the
scheduler, to be run again) and ``INTERRUPTED`` (ended by the user, after a checkpoint); see
`dtrain.launchers.exit_codes`.
"""

from __future__ import annotations

from typing import ClassVar

from dtrain.launchers.exit_codes import BAD_CONFIG, FAILED


class DtrainError(Exception):
    """Base of all errors that dtrain raises on purpose; ``str(error)`` is the whole message for a person."""

    exit_code: ClassVar[int] = FAILED


class ConfigError(DtrainError):
    """A configuration that cannot be run: an unknown key, a value of the wrong type or range, parts that do not fit."""

    exit_code: ClassVar[int] = BAD_CONFIG


class DataError(ConfigError):
    """Data that are missing, empty, too short or damaged."""


class ResumeError(ConfigError):
    """A stored run that cannot resume under the requested configuration; the differences are listed."""


class ModelError(ConfigError):
    """A model that does not return a scalar loss tensor that depends on its parameters."""


class FailedAtTheStart(ConfigError):
    """An error of the model, the data or the engine before any step was done; it would happen again after a restart."""


class CheckpointError(DtrainError):
    """A checkpoint that cannot be read, or that belongs to another model, method or layout."""


class WouldRecur(DtrainError):
    """A deterministic failure: runs are reproducible, so it would recur from the same checkpoint."""

    exit_code: ClassVar[int] = BAD_CONFIG


class TooManySkippedSteps(WouldRecur):
    """More steps were skipped for NaN or Inf gradients than ``train.max_skipped_steps`` allows, or the last ones."""


class NotFinite(WouldRecur):
    """Parameters, optimizer or sync state that hold NaN or Inf, so that no checkpoint of them is written."""


class FailedTwice(WouldRecur):
    """An error of the model, the data or the engine that a restart from the last checkpoint met again."""


class WorkerFailed(DtrainError):
    """A worker process failed and its restarts are used up; the message starts with the root cause."""
