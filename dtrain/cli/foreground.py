"""Runs in the foreground: workers that the command starts on this machine, or a job that it follows."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli.ctrl_c import STOPPING, Stopping, goes_on_from, interruption
from dtrain.cli.follow import exit_code, watched
from dtrain.cli.resume_hint import STOP_AFTER, command, last_checkpoint
from dtrain.cli.submit import worker
from dtrain.errors import DtrainError
from dtrain.launchers.exit_codes import BAD_CONFIG, FAILED, INTERRUPTED, RUN_AGAIN
from dtrain.launchers.job import command_of

if TYPE_CHECKING:
    from dtrain.launchers.failure import Ending
    from dtrain.launchers.job import Job
    from dtrain.train.config import Config


def follow_run(config: Config, job: Job, words: Sequence[str]) -> int:
    """Show the progress of a job until it has ended, then its summary or what went wrong.

    Ctrl-C, or SIGTERM, leaves a scheduler's job running and ends any other.
    """
    from dtrain.launchers.failure import Ending
    from dtrain.report.progress import Progress

    def stopping() -> None:
        print(f"job {job.id}: {STOPPING}; Ctrl-C again leaves it to end by itself", flush=True)

    progress = Progress(Path(config.run.dir) / "metrics.jsonl", steps=config.train.steps)
    ended = watched(job, lambda: None, stopping, display=progress)
    if not ended and job.scheduled:
        return INTERRUPTED
    if not ended:
        return finish(config, Ending("signalled", signal.SIGINT, 0, ()), words)
    if job.state() != "finished":
        return exit_code(job)
    return finish(config, Ending("finished", None, 0, ()), words)


def command_of_worker(config: Config) -> list[str]:
    """The command of each rank on this machine."""
    return list(command_of(worker(config.run.dir), Path(config.run.dir), python=config.launcher.python))


def run_here(config: Config, words: Sequence[str], *, goes_on_from: Path | None) -> int:
    """Start the workers on this machine and stay until they have ended; returns the exit code."""
    from dtrain.launchers import foreground_job
    from dtrain.launchers.elastic_agent import launch
    from dtrain.launchers.failure import Failure, root_cause
    from dtrain.report.progress import Progress, say
    from dtrain.train.signals import overheard

    folder = Path(config.run.dir)
    start = f"goes on from {goes_on_from}" if goes_on_from else "starts"
    mesh = f"{config.mesh.replicate} replicas x {config.mesh.shard} shards, {config.engine.name}"
    say(f"run {config.run.dir} {start}: {config.launcher.workers} workers, {mesh}")
    foreground_job.began(folder, command_of_worker(config), config.launcher.workers)
    with Progress(folder / "metrics.jsonl", steps=config.train.steps) as progress:

        def tell(cause: Failure, restart: int) -> None:
            count = f"restart {restart} of at most {config.launcher.max_restarts}"
            progress.say(f"rank {cause.rank} failed: {cause.message} (log: {cause.log})")
            progress.say(f"{count}, from the last checkpoint")

        ours = foreground_job.variables(folder, config.launcher.hang_seconds)
        with overheard(Stopping(config, words, progress)):
            ending = launch(
                command_of_worker(config),
                workers=config.launcher.workers,
                log_folder=folder / "logs",
                max_restarts=config.launcher.max_restarts,
                grace_seconds=config.launcher.grace_seconds,
                threads_per_worker=config.launcher.threads_per_worker,
                environment={**config.launcher.variables(), **ours},
                on_restart=tell,
            )
    try:
        code = finish(config, ending, words)
    except DtrainError as error:
        foreground_job.ended(folder, error.exit_code, str(error))
        raise
    foreground_job.ended(folder, code, root_cause(ending) if ending.failures else "")
    return code


def finish(config: Config, ending: Ending, words: Sequence[str]) -> int:
    """Report how the run ended; returns the exit code for it. ``words``: the overrides that ``config`` was made of.

    Workers cannot report it by their exit code (any but 0 makes the elastic agent restart), so rank 0 writes
    outcome.json.
    """
    from dtrain.launchers.failure import root_cause, signal_name
    from dtrain.report import summary
    from dtrain.report.at_the_end import write_report
    from dtrain.report.progress import say
    from dtrain.train.config import run_folder

    folder = Path(config.run.dir)
    outcome = run_folder.outcome(folder)
    interrupted = ending.kind == "signalled" and ending.signal == signal.SIGINT
    if outcome is None and interrupted:
        if any(not (failure.consequence or interruption(failure)) for failure in ending.failures):
            print(f"dtrain: error: {root_cause(ending)}", file=sys.stderr)
        say(f"SIGINT: ended before it could checkpoint; {goes_on_from(config, words)}")
        return INTERRUPTED
    if outcome is None or ending.kind == "failed":
        if ending.failures:
            print(f"dtrain: error: {root_cause(ending)}", file=sys.stderr)
        else:
            name = signal.Signals(ending.signal).name if ending.signal else "an unknown cause"
            print(f"dtrain: error: the run ended by {name} before it had a checkpoint", file=sys.stderr)
        codes = {failure.exit_code for failure in ending.failures[:1]}
        return BAD_CONFIG if codes == {BAD_CONFIG} else FAILED
    if outcome.get("reason") == "signal":
        number = outcome.get("signal")
        name = signal_name(number) if isinstance(number, int) else "a signal"
        step, checkpoint = outcome.get("step"), last_checkpoint(config)
        done = f"checkpointed at step {step}; the same command goes on"
        if outcome.get("withheld"):
            resume_point = f"step {checkpoint}, its last checkpoint," if checkpoint else "the start"
            done = (
                f"left at step {step} without a checkpoint, as its last steps were skipped for gradients that are not "
                f"finite; the same command goes on from {resume_point} and would meet them again"
            )
        say(f"{name}: {done}:\n  {command(words, config)}")
        return INTERRUPTED if interrupted or number == signal.SIGINT else RUN_AGAIN
    if outcome.get("reason") == "stopped":
        say(
            f"stopped at step {outcome.get('step')} as asked; it goes on with a larger {STOP_AFTER}, or without it:\n"
            f"  {command(words, config, to_the_end=True)}"
        )
    if (folder / "summary.json").is_file():
        try:
            say(summary.render(summary.read(folder / "summary.json")))
        except (OSError, ValueError) as error:
            raise DtrainError(f"{error}; the run itself has ended as it should") from error
        if config.run.report:
            say(write_report(folder))
    return 0
