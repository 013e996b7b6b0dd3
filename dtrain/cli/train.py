"""``dtrain train``: checks a configuration, writes the run folder, starts the workers, says how it ended."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import add_config_dir, add_verb, words_of
from dtrain.cli.foreground import command_of_worker, follow_run, run_here
from dtrain.cli.login_host import enter_launcher
from dtrain.cli.resume_hint import nothing_left
from dtrain.cli.submit import goes_on, refusals, warn, worker
from dtrain.extras import OF_TRAINING, require

if TYPE_CHECKING:
    from dtrain.cli import Verbs
    from dtrain.train.config import Config

CONFIGS = Path(__file__).parent.parent / "configs"


def _choices(group: str) -> str:
    return f"{{{','.join(sorted(path.stem for path in (CONFIGS / group).glob('*.yaml')))}}}"


EPILOG = f"""\
overrides:
  group=choice  engine={_choices("engine")}  launcher={_choices("launcher")}
                sync={_choices("sync")}
                compress={_choices("compress")}
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
        return run_here(config, words, goes_on_from=folder)


def _dry_run(config: Config, start: str) -> int:
    """Print the configuration and what would be started."""
    from dtrain.train.config import to_yaml
    from dtrain.train.config.composition import commented

    launcher, here = config.launcher, Path(config.run.dir)
    if launcher.here:
        command = shlex.join(command_of_worker(config))
        print(f"{to_yaml(config)}# {start}\n# {launcher.workers} workers, each: {command}")
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
