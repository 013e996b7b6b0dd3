"""Whether a run has anything left to train, and the command that resumes it, to be pasted."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.train.config import Config

STOP_AFTER = "train.stop_after_steps"


def nothing_left(config: Config, folder: Path | None) -> str | None:
    """Why the run needs no workers, in words; None if there is something to train. Changes nothing on disk.

    ``folder``: the run to resume.

    Raises:
        ConfigError: the checkpoint is beyond the step at which the run is to end.
    """
    from dtrain.train.checkpoint.folders import step_of
    from dtrain.train.checkpoint_choice import look, own_checkpoint

    if folder is None:
        return None
    run_dir, settings = Path(config.run.dir), config.train
    end = min(settings.steps, settings.stop_after_steps or settings.steps)
    key = "train.steps" if end == settings.steps else STOP_AFTER
    path = look(run_dir, config.run.resume, crc=False, tell=_warn)
    if path is None or (step_of(path) or 0) < end:
        return None
    path = look(run_dir, config.run.resume)  # reads every byte, so only where it matters: a damaged one is no end
    step = (step_of(path) or 0) if path else 0
    if path is None or step < end:
        return None
    if step > end or not own_checkpoint(path, run_dir):
        raise ConfigError(
            f"{key}={end}, but {path} is at step {step} already: give a larger {key} to go on from there, or start "
            "from step 0: a run.dir that has no run yet, without run.resume"
        )
    if key == STOP_AFTER:
        return f"already stopped: {run_dir}, step {step}, as {STOP_AFTER}={end} asks; a larger one goes on, or none"
    if _summed_up(run_dir) != step:
        return None  # it was killed between its last checkpoint and its summary
    return (
        f"already finished: {run_dir}, step {step} of {end}; train.steps=... to go on, or another run.dir for a new run"
    )


def _warn(text: str) -> None:
    print(f"dtrain: warning: {text}", file=sys.stderr)


def _summed_up(folder: Path) -> int | None:
    """The step of the summary."""
    from dtrain.report import summary

    try:
        return summary.read(folder / "summary.json").steps
    except (OSError, ValueError, TypeError, KeyError):
        return None


def command(words: Sequence[str], config: Config, *, to_the_end: bool = False) -> str:
    """The command line that resumes the run of ``config``, which was made of the overrides ``words``: all of them.

    Without ``run.resume=never``, which would refuse the run, and, to resume ``to_the_end``, without
    ``train.stop_after_steps``, which would stop it where it is.
    """
    from dtrain.train.config.words import written

    keys = {_key(word) for word in words}
    undone = {"run.resume": "auto"} if config.run.resume == "never" else {}
    undone |= {STOP_AFTER: "0"} if to_the_end else {}
    remaining = [word for word in words if _key(word) not in undone]
    remaining += [f"{key}={value}" for key, value in undone.items() if key not in keys]  # set as train={...}
    if "run.dir" not in keys:
        remaining.append(written("run.dir", _short(config.run.dir)))
    return shlex.join([*_program(), "train", *remaining])


def last_checkpoint(config: Config) -> int | None:
    """The step of the last checkpoint of the run's own, by its name; None if there is none."""
    from dtrain.train.checkpoint.folders import step_folders, step_of

    steps = step_folders(Path(config.run.dir) / "checkpoints")
    return step_of(steps[-1]) if steps else None


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _program() -> list[str]:
    """``dtrain`` as it was called: by its name where the shell finds it, else by its path."""
    called = sys.argv[0]
    if Path(called).name != "dtrain":
        return [sys.executable, "-m", "dtrain"]
    on_path = shutil.which("dtrain")
    return ["dtrain" if on_path and os.path.realpath(on_path) == os.path.realpath(called) else called]


def _short(path: str) -> str:
    """Relative to the current folder if it lies below."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path
