"""Submits jobs to launchers, for all verbs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError, DtrainError

if TYPE_CHECKING:
    from dtrain.launchers.job import Job
    from dtrain.launchers.launcher import Launcher


def worker(folder: str | Path) -> list[str]:
    """What each rank of a training job runs. ``folder``: the run's, or "{folder}" for that of each run of a sweep."""
    return ["python", "-u", "-m", "dtrain.train.worker", f"{folder}/config.yaml"]


def require_sound(launcher: Launcher, replicas: int = 1) -> None:
    """Raise ``ConfigError`` for settings that are invalid wherever the launcher runs."""
    if problems := launcher.problems(replicas):
        raise ConfigError("\n".join(problems))


def warn(warnings: Sequence[str]) -> None:
    """Print what will run, but most likely not as intended."""
    for warning in warnings:
        print(f"dtrain: warning: {warning}", file=sys.stderr)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Around calls of a launcher: a refusal becomes a ``ConfigError``, a failure a ``DtrainError``."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise DtrainError(str(error)) from error


def goes_on(job: Job, launcher: Launcher, what: str) -> bool:
    """Print that a job was started, and what it runs; whether it continues on its own, and is not to be followed."""
    print(f"job {job.id} ({launcher.name}): {what}", flush=True)
    if not job.scheduled or launcher.wait:
        return False
    print(f"  dtrain jobs status {job.id}     dtrain jobs logs {job.id} -f     dtrain jobs why {job.id}")
    return True
