"""``dtrain bench train``: what a sync costs in steps, and in loss, beside others and beside no communication."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import words_of
from dtrain.cli.bench_rows import Shown, show_rows
from dtrain.cli.login_host import enter_launcher
from dtrain.cli.submit import refusals, warn
from dtrain.errors import ConfigError
from dtrain.extras import OF_TRAINING, require

if TYPE_CHECKING:
    from dtrain.bench.train_settings import TrainSettings
    from dtrain.train.config import Config

EPILOG = """\
settings:
  bench.syncs=dense,bf16,int8_ef,diloco     what is compared: choices of the group sync, or of compress for every step's
                    gradients; diloco/50 has rounds of 50 steps, diloco:int8 sends int8, diloco/50:int8 both
  bench.rounds=9    how often each sync is timed, between two blocks of the same training without communication
  bench.block_steps=10 bench.warmup=1     steps of a block, made whole rounds of a local update; rounds before the first
  bench.steps=0     how long each is trained for its losses, from the same seed; 0: only times are measured
  bench.loss=0      a loss to be reached; 0: that at the end of the first sync's training
  everything else   is what dtrain train takes: model, data, engine, mesh, optim, launcher

examples:
  dtrain bench train launcher.workers=4 bench.syncs=dense,powersgd_ef,diloco/50:int8
  dtrain bench train launcher=slurm launcher.nodes=4 launcher.workers=4 engine=ddp mesh.shard=1 mesh.replicate=4 \
bench.steps=300
"""
OURS = ("sync", "compress", "run.resume", "run.weights", "train.steps", "train.evaluate_every_steps",
        "train.checkpoint_every_steps", "train.stop_after_steps")  # fmt: skip
EVALUATIONS = 10
"""In each training, beside the one before its first step."""


def run(chosen: argparse.Namespace) -> int:
    """Start it, and print its rows as they come; returns the exit code."""
    require(OF_TRAINING)
    from dtrain.bench.settings import FILE
    from dtrain.bench.train_page import report
    from dtrain.bench.train_rows import HEAD, TrainRow, line, summary
    from dtrain.bench.train_settings import parse
    from dtrain.train.config import run_folder

    settings, words = parse(words_of(chosen))
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key in OURS or key.startswith("sync."):
            raise ConfigError(f"{word}: bench train sets {key} itself, for each of bench.syncs; leave it out")
    base, named = _composed(settings.syncs[0], words)
    enter_launcher(base.launcher, sys.argv[1:])
    folder = Path(base.run.dir).absolute()
    launcher = base.launcher.replaced(max_restarts=0)  # a restart would fail again, and write its rows twice
    warn(launcher.warnings())
    with refusals():
        launcher.check([folder])
        if not named:
            folder = run_folder.made(folder)
        cells = _cells(settings, words, folder)
        program = ["python", "-m", "dtrain.bench.train_worker", str(folder / FILE)]
        with run_folder.locked(folder):
            settings.write(folder)
            (folder / "rows.jsonl").unlink(missing_ok=True)
            for config, description in cells:
                run_folder.write(config, description)
            job = launcher.start(program, folder=folder, name="bench", replicas=base.mesh.replicate)
    return show_rows(job, folder, Shown(TrainRow, HEAD, line, lambda rows: summary(rows, settings.loss), report))


def _composed(sync: str, words: Sequence[str]) -> tuple[Config, bool]:
    from dtrain.bench.train_settings import words_of_sync
    from dtrain.train.config.composition import compose_named

    return compose_named([*words, *words_of_sync(sync)], name="bench")


def _cells(
    settings: TrainSettings, words: Sequence[str], folder: Path
) -> list[tuple[Config, Mapping[str, object]]]:  # fmt: skip
    """The configuration of each sync, and the description of its data; all are checked before anything is written."""
    from dtrain.bench.train_settings import cell_folder
    from dtrain.train.config import run_folder, validate

    cells: list[tuple[Config, Mapping[str, object]]] = []
    for number, sync in enumerate(settings.syncs):
        own = [f"run.dir={folder / cell_folder(number, sync)}", "run.resume=auto"]
        if steps := settings.steps:
            every = f"train.evaluate_every_steps={max(1, steps // EVALUATIONS)}"
            own += [f"train.steps={steps}", every, "train.checkpoint_every_steps=0"]
        try:
            config = run_folder.absolute(_composed(sync, [*_without_folder(words), *own])[0])
            cells.append((config, validate(config)))
        except ConfigError as error:
            raise ConfigError(f"{sync}: {error}") from error
    return cells


def _without_folder(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.partition("=")[0] != "run.dir"]
