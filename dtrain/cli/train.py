"""``dtrain train``: checks a configuration, writes the run folder, starts the workers, says how it ended."""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import add_config_dir, add_verb, words_of
from dtrain.cli.ctrl_c import STOPPING, Stopping, goes_on_from, interruption
from dtrain.cli.follow import exit_code, watched
from dtrain.cli.login_host import enter_launcher
from dtrain.cli.resume_hint import STOP_AFTER, command, last_checkpoint, nothing_left
from dtrain.cli.submit import goes_on, refusals, warn, worker
from dtrain.errors import DtrainError
from dtrain.extras import OF_TRAINING, require
from dtrain.launchers.exit_codes import BAD_CONFIG, CHECKPOINTED, FAILED, INTERRUPTED
from dtrain.launchers.job import command_of

if TYPE_CHECKING:
    from dtrain.cli import Verbs
    from dtrain.launchers.failure import Ending
    from dtrain.launchers.job import Job
    from dtrain.train.config import Config

CONFIGS = Path(__file__).parent.parent / "configs"


def _choices(group: str) -> str:
    return f"{{{','.join(sorted(path.stem for path in (CONFIGS / group).glob('*.yaml')))}}}"


EPILOG = f"""\
overrides:
  group=choice  engine={_choices("engine")}  launcher={_choices("launcher")}
                sync={_choices("sync")}
                compress@sync.compress={_choices("compress")}
                optim={_choices("optim")}  model={_choices("model")}  data={_choices("data")}
  key=value     mesh.replicate=2 mesh.shard=2 launcher.workers=4 train.steps=300 optim.inner.lr=0.001 data.path=FOLDER
                text is what stands after the first =, as it is; '~/' is the home folder; lists: 'key=["a=1","b"]'
  @FILE         what a YAML file says (sync: diloco, train: {{steps: 50}}, train.seed: 2), or a run's config.yaml; later
                words win. @FOLDER: choices of one's own, FOLDER/sync/mine.yaml is sync=mine
  run.resume    auto: go on where run.dir left off; never: refuse a run.dir that has a run; PATH: start from another run

examples:
  dtrain train run.dir=runs/x                     the same command again goes on from the last checkpoint
  dtrain train run.dir=runs/y run.resume=runs/x   a new run that starts from another one's checkpoint
  dtrain train @exp.yaml train.seed=2 run.dir=runs/z
  dtrain train model=custom model._target_=mine.Model model.width=256
  dtrain train launcher=slurm launcher.nodes=4 launcher.partition=gpu      submit, print the job's id, return
  dtrain train -m sync=dense,diloco train.seed=1,2,3 launcher=slurm        a job array, a run for each combination

exit codes:
  0 finished, or stopped as asked; 2 bad configuration (nothing was launched), or an error that would come again (before
  the first step, NaN or infinity, the same one twice); 75 checkpointed after a signal, to be run again; 130 ended by
  the user; 1 failed
"""


def add(verbs: Verbs) -> None:
    """Add ``train``."""
    train = add_verb(verbs, "train", does="train a model", epilog=EPILOG)
    train.add_argument("--dry-run", action="store_true", help="print the configuration and the command; start nothing")
    train.add_argument("-m", "--multirun", action="store_true", help="a run for each combination of key=a,b,c")
    add_config_dir(train)
    train.add_argument("words", nargs="*", metavar="OVERRIDE", help="group=choice, key=value or @FILE")
    train.set_defaults(run=_train, outlives_reader=True)


def _train(chosen: argparse.Namespace) -> int:
    require(OF_TRAINING)
    if chosen.multirun:
        from dtrain.cli.sweep import sweep

        return sweep(words_of(chosen), train, dry_run=chosen.dry_run)
    return train(words_of(chosen), dry_run=chosen.dry_run)


def train(words: Sequence[str], *, dry_run: bool = False) -> int:
    """Train as these overrides say; returns the exit code."""
    from dtrain.train.config import run_folder, validate
    from dtrain.train.config.composition import compose_named
    from dtrain.train.config.validation import warnings

    config, named = compose_named(words)
    config = run_folder.absolute(config)
    launcher, here = config.launcher, Path(config.run.dir)
    enter_launcher(launcher, sys.argv[1:], dry_run=dry_run)
    description = validate(config)
    folder = run_folder.previous(config)
    if folder:
        run_folder.check(config, description, folder)
    if left := nothing_left(config, folder):
        print(left)
        return 0
    warn([*warnings(config), *launcher.warnings()])
    if named and not dry_run and not launcher.here:
        run_folder.without_job(here)
    with refusals():
        if launcher.here or not dry_run:
            launcher.check([here])
    if dry_run:
        return _dry_run(config, f"goes on from {folder}" if folder else "starts from step 0")
    if not named:
        config = run_folder.in_its_own(config)
    if not launcher.here:
        return _submit(config, description, words)
    with run_folder.locked(Path(config.run.dir)):
        run_folder.write(config, description)
        return _launch(config, words, goes_on_from=folder)


def _dry_run(config: Config, start: str) -> int:
    """Print the configuration and what would be started."""
    from dtrain.train.config import to_yaml
    from dtrain.train.config.composition import commented

    launcher, here = config.launcher, Path(config.run.dir)
    if launcher.here:
        print(f"{to_yaml(config)}# {start}\n# {launcher.workers} workers, each: {shlex.join(_worker(config))}")
        return 0
    with refusals():
        text = launcher.render(worker(here), folder=here, name=here.name, replicas=config.mesh.replicate)
    print(f"{text}\n{commented(config)}# {start}")
    return 0


def _submit(config: Config, description: Mapping[str, object], words: Sequence[str]) -> int:
    """Hand the run over to its launcher; its job id is all that is printed, unless it is to be followed."""
    from dtrain.train.config import run_folder

    launcher, here = config.launcher, Path(config.run.dir)
    with refusals(), run_folder.locked(here), run_folder.withdrawn_if_refused(here):
        run_folder.write(config, description)
        job = launcher.start(worker(here), folder=here, name=here.name, replicas=config.mesh.replicate)
    return 0 if goes_on(job, launcher, f"run {here}") else follow_run(config, job, words)


def follow_run(config: Config, job: Job, words: Sequence[str]) -> int:
    """Show the progress of a job until it has ended, then its summary or what went wrong.

    Ctrl-C, or SIGTERM, leaves a job that a scheduler keeps as it is and ends any other.
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


def _worker(config: Config) -> list[str]:
    """The command of each rank on this machine."""
    return list(command_of(worker(config.run.dir), Path(config.run.dir), python=config.launcher.python))


def _launch(config: Config, words: Sequence[str], *, goes_on_from: Path | None) -> int:
    from dtrain.launchers import foreground, probe
    from dtrain.launchers.failure import Failure, root_cause
    from dtrain.launchers.local import launch
    from dtrain.launchers.lock import HELD
    from dtrain.launchers.records import rank_files
    from dtrain.report.progress import Progress, say
    from dtrain.train.signals import overheard

    here = Path(config.run.dir)
    start = f"goes on from {goes_on_from}" if goes_on_from else "starts"
    mesh = f"{config.mesh.replicate} replicas x {config.mesh.shard} shards, {config.engine.name}"
    say(f"run {config.run.dir} {start}: {config.launcher.workers} workers, {mesh}")
    shutil.rmtree(rank_files(here), ignore_errors=True)  # another job's
    foreground.began(here, _worker(config), config.launcher.workers)
    with Progress(here / "metrics.jsonl", steps=config.train.steps) as progress:

        def tell(cause: Failure, restart: int) -> None:
            count = f"restart {restart} of at most {config.launcher.max_restarts}"
            progress.say(f"rank {cause.rank} failed: {cause.message} (log: {cause.log})")
            progress.say(f"{count}, from the last checkpoint")

        ours = {
            HELD: str(here), probe.FOLDER: str(rank_files(here)),
            probe.HANG_SECONDS: f"{config.launcher.hang_seconds:g}",
        }  # fmt: skip
        with overheard(Stopping(config, words, progress)):
            ending = launch(
                _worker(config),
                workers=config.launcher.workers,
                log_folder=here / "logs",
                max_restarts=config.launcher.max_restarts,
                grace_seconds=config.launcher.grace_seconds,
                threads_per_worker=config.launcher.threads_per_worker,
                environment={**config.launcher.variables(), **ours},
                on_restart=tell,
            )
    try:
        code = finish(config, ending, words)
    except DtrainError as error:
        foreground.ended(here, error.exit_code, str(error))
        raise
    foreground.ended(here, code, root_cause(ending) if ending.failures else "")
    return code


def finish(config: Config, ending: Ending, words: Sequence[str]) -> int:
    """Say how the run ended, and the exit code for it. ``words``: the overrides that ``config`` was made of.

    Workers cannot tell by their own exit code (any but 0 means restart to the elastic agent), so rank 0 leaves
    outcome.json.
    """
    from dtrain.launchers.failure import root_cause, signal_name
    from dtrain.report import summary
    from dtrain.report.progress import say
    from dtrain.train.config import run_folder

    here = Path(config.run.dir)
    outcome = run_folder.outcome(here)
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
        step, last = outcome.get("step"), last_checkpoint(config)
        done = f"checkpointed at step {step}; the same command goes on"
        if outcome.get("withheld"):
            there = f"step {last}, its last checkpoint," if last else "the start"
            done = (
                f"left at step {step} without a checkpoint, as its last steps were skipped for gradients that are not "
                f"finite; the same command goes on from {there} and would meet them again"
            )
        say(f"{name}: {done}:\n  {command(words, config)}")
        return INTERRUPTED if interrupted or number == signal.SIGINT else CHECKPOINTED
    if outcome.get("reason") == "stopped":
        say(
            f"stopped at step {outcome.get('step')} as asked; it goes on with a larger {STOP_AFTER}, or without it:\n"
            f"  {command(words, config, to_the_end=True)}"
        )
    if (here / "summary.json").is_file():
        try:
            say(summary.render(summary.read(here / "summary.json")))
        except (OSError, ValueError) as error:
            raise DtrainError(f"{error}; the run itself has ended as it should") from error
    return 0
