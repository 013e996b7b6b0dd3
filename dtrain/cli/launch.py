"""``dtrain launch``: the launchers, for any program: ranks, rendezvous, logs, requeue and diagnosis."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import LAUNCHER_WORDS, add_config_dir, add_verb, words_of
from dtrain.cli.follow import follow
from dtrain.cli.login_host import enter_launcher
from dtrain.cli.submit import goes_on, refusals, require_sound, warn
from dtrain.errors import ConfigError
from dtrain.extras import OF_LAUNCHING, require

if TYPE_CHECKING:
    from dtrain.cli import Verbs
    from dtrain.launchers.launcher import Launcher

EPILOG = """\
The program is started once per rank, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT
in its environment. A program that leaves with exit code 75 says: checkpointed, run me again; with 2 (a shell's 126 and
127 too): it would fail again, so it is not started again.
Ctrl-C, SIGTERM, or a terminal that is closed (not under nohup) ends a job on this machine and waits until it has
checkpointed; a job of Slurm's goes on.

examples:
  dtrain launch launcher.workers=2 -- python my_train.py --lr 0.1
  dtrain launch launcher=slurm launcher.nodes=4 launcher.workers=16 launcher.partition=gpu -- python my_train.py
  dtrain launch --dry-run launcher=slurm launcher.nodes=4 -- python my_train.py        print the sbatch script
  dtrain jobs why ID                                                                   when it went wrong
"""


def add(verbs: Verbs) -> None:
    """Add ``launch``."""
    launch = add_verb(verbs, "launch", does="launch any program, a process per rank", epilog=EPILOG)
    launch.add_argument("--dry-run", action="store_true", help="print the exact script or command; start nothing")
    launch.add_argument("--name", default="launch", help="the job's name (default: %(default)s)")
    add_config_dir(launch)
    launch.add_argument("words", nargs="*", metavar="OVERRIDE", help="launcher=..., launcher.KEY=..., run.dir=FOLDER")
    launch.set_defaults(run=_launch, outlives_reader=True, takes_program=True)


def _launch(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    from dtrain.train.config import run_folder
    from dtrain.train.config.composition import compose_named

    if not chosen.program:
        raise ConfigError("say what to launch, after --: dtrain launch launcher.workers=2 -- python my_train.py")
    for word in chosen.words:
        if not word.lstrip("+").startswith(LAUNCHER_WORDS):
            raise ConfigError(
                f"{word}: launch takes launcher=..., launcher.KEY=..., run.dir=FOLDER and @FILE; the rest is train's"
            )
    if not chosen.name.isprintable() or "/" in chosen.name or not chosen.name:
        raise ConfigError(f"--name {chosen.name!r}: a job's name is one line without a slash, as it is part of a path")
    config, named = compose_named(words_of(chosen), name=chosen.name)
    launcher = config.launcher
    enter_launcher(launcher, sys.argv[1:], dry_run=chosen.dry_run)
    folder = Path(config.run.dir).absolute()
    require_sound(launcher, replicas := launcher.nodes)  # as for a replica per node: the program's mesh is unknown
    warn(launcher.warnings())
    _must_be_there(chosen.program, launcher)
    if chosen.dry_run:
        with refusals():
            print(launcher.render(chosen.program, folder=folder, name=chosen.name, replicas=replicas), end="")
        return 0
    if named:
        run_folder.without_job(folder)
        if (folder / run_folder.DATA).is_file():
            raise ConfigError(
                f"run.dir={folder} holds a training run of dtrain, whose records would be overwritten; choose another "
                "run.dir"
            )
    with refusals():
        launcher.check([folder])
        if not named:
            folder = run_folder.made(folder)
        log = folder / "logs" / "rank-0.log"
        begin = log.stat().st_size if log.is_file() else 0  # what an earlier job has printed is not shown again
        with run_folder.locked(folder), run_folder.withdrawn_if_refused(folder):
            job = launcher.start(chosen.program, folder=folder, name=chosen.name, replicas=replicas)
    return 0 if goes_on(job, launcher, str(folder)) else follow(job, begin)


def _must_be_there(program: Sequence[str], launcher: Launcher) -> None:
    """Raise ``ConfigError`` for a program that no rank could start, where the ranks see this machine's files."""
    first, *rest = program
    if not launcher.same_files:
        return
    if first in ("python", "python3") and rest and rest[0].endswith(".py") and not Path(rest[0]).exists():
        raise ConfigError(f"there is no {rest[0]} in {Path.cwd()}: name the program as it is found from here")
    if launcher.here and first not in ("python", "python3") and shutil.which(first) is None:
        raise ConfigError(f"there is no program {first} on PATH or at that path: nothing was started")
