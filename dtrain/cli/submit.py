"""Handing a run over to a launcher that runs it elsewhere, and following it there."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dtrain.errors import ConfigError, DtrainError
from dtrain.launchers.exit_codes import INTERRUPTED

if TYPE_CHECKING:
    from dtrain.launchers.job import Job, Launcher
    from dtrain.train.config import Config


@runtime_checkable
class Checked(Protocol):
    """A launcher whose scheduler can be asked beforehand whether it would take a job."""

    def check(self, folders: Sequence[Path]) -> None:
        """Raise ``ValueError`` if it would not."""


def program(folder: str | Path) -> list[str]:
    """What each rank of a submitted job runs."""
    return ["python", "-u", "-m", "dtrain.train.worker", f"{folder}/config.yaml"]


def submit(
    config: Config, description: Mapping[str, object], launcher: Launcher, words: Sequence[str], *, named: bool
) -> int:
    """Hand the run over to a launcher; its job id is all that is printed, unless it is to be followed.

    ``words``: the overrides that ``config`` was made of. ``named``: whether they name the run folder.
    """
    from dtrain.train.config import run_folder

    here = Path(config.run.dir)
    if named:
        run_folder.without_job(here)
    try:
        if isinstance(launcher, Checked):
            launcher.check([here])
        if not named:
            config = run_folder.in_its_own(config)
            here = Path(config.run.dir)
        with run_folder.locked(here), run_folder.withdrawn_if_refused(here):
            run_folder.write(config, description)
            job = launcher.submit(program(here), folder=here, name=here.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise DtrainError(str(error)) from error
    print(f"job {job.id} ({launcher.name}): run {here}", flush=True)
    if config.launcher.name == "slurm" and not config.launcher.wait:
        print(f"  dtrain jobs status {job.id}     dtrain jobs logs {job.id} -f     dtrain jobs why {job.id}")
        return 0
    return follow(config, job, words)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does, so that a command that is ended ends its job, too.

    So does SIGHUP, by which a terminal that is closed ends what it has started, unless nohup keeps it away.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    old = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def follow(config: Config, job: Job, words: Sequence[str]) -> int:
    """Show the progress of a job until it has ended, then its summary or what went wrong.

    Ctrl-C, or SIGTERM, leaves a job of Slurm's as it is and ends any other.
    """
    from dtrain.cli.ctrl_c import STOPPING
    from dtrain.cli.follow import exit_code
    from dtrain.cli.train import finish
    from dtrain.launchers.failure import Ending
    from dtrain.launchers.job import ENDED
    from dtrain.report.progress import Progress

    here = Path(config.run.dir)
    try:
        with sigterm_interrupts(), Progress(here / "metrics.jsonl", steps=config.train.steps):
            while job.state() not in ENDED:
                time.sleep(0.5)
    except KeyboardInterrupt:
        if job.facts.launcher == "slurm":
            print(f"job {job.id} goes on; dtrain jobs cancel {job.id} ends it", file=sys.stderr)
            return INTERRUPTED
        print(f"job {job.id}: {STOPPING}; Ctrl-C again leaves it to end by itself", flush=True)
        job.cancel()
        job.wait()
        return finish(config, Ending("signalled", signal.SIGINT, 0, ()), words)
    if job.state() != "finished":
        return exit_code(job)
    return finish(config, Ending("finished", None, 0, ()), words)
