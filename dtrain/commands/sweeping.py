"""``dtrain train -m key=a,b``: a run for each combination of values; one job array under Slurm, one table."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.commands.entering import enter_launcher
from dtrain.commands.submitting import program
from dtrain.errors import ConfigError, DtrainError

if TYPE_CHECKING:
    from dtrain.config import Config

FILE = "sweep.json"
COLUMNS = ("loss", "validation_loss", "tokens_per_second", "sent_bytes_per_rank")


@dataclass(frozen=True)
class Run:
    """One combination: its values in words, and its folder."""

    values: str
    folder: Path


def combinations(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every combination of a sweep: its values in words, and the overrides that it is composed from.

    >>> [values for values, _ in combinations(["sync=dense,diloco", "train.seed=1,2", "train.steps=3"])]
    ['sync=dense,train.seed=1', 'sync=dense,train.seed=2', 'sync=diloco,train.seed=1', 'sync=diloco,train.seed=2']

    Raises:
        ConfigError: a word that cannot be read, or none that has several values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    fixed: list[str] = []
    swept: list[list[str]] = []
    for word in words:
        try:
            override = OverridesParser.create().parse_overrides([word])[0]
        except HydraException as error:
            raise ConfigError(f"cannot read {word!r}: {str(error).splitlines()[0]}") from error
        if override.is_sweep_override():
            key = word.partition("=")[0]
            swept.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            fixed.append(word)
    if not swept:
        raise ConfigError("train -m needs a key with several values, as in train.seed=1,2,3")
    return [(",".join(chosen), [*fixed, *chosen]) for chosen in itertools.product(*swept)]


def sweep(words: Sequence[str], *, dry_run: bool) -> int:
    """Run, or submit, every combination; returns the exit code."""
    from dtrain.config import compose, run_folder, validate

    chosen = combinations(words)
    if any(word.startswith("run.dir=") for _, overrides in chosen for word in overrides):
        base = Path(next(w for w in chosen[0][1] if w.startswith("run.dir=")).partition("=")[2]).absolute()
        chosen = [(v, [w for w in overrides if not w.startswith("run.dir=")]) for v, overrides in chosen]
    else:
        first = Path(compose(chosen[0][1]).run.dir).absolute()
        base = first.with_name(first.name.rpartition("-")[0] + "-sweep")
    runs = [Run(values, base / f"{number}-{values}") for number, (values, _) in enumerate(chosen)]
    configs = [
        run_folder.absolute(compose([*overrides, f"run.dir='{run.folder}'"]))
        for run, (_, overrides) in zip(runs, chosen, strict=True)
    ]
    enter_launcher(configs[0].launcher, sys.argv[1:], dry_run=dry_run)
    descriptions = [validate(config) for config in configs]
    if configs[0].launcher.name == "slurm":
        return _array(base, runs, configs, descriptions, dry_run=dry_run)
    from dtrain.commands.train import train

    codes = []
    for run, (_, overrides) in zip(runs, chosen, strict=True):
        print(f"---- {run.values} ----", flush=True)
        codes.append(train([*overrides, f"run.dir='{run.folder}'"], dry_run=dry_run))
    if not dry_run:
        _write(base, runs)
        print(table(base))
    return max(codes)


def _array(
    base: Path,
    runs: Sequence[Run],
    configs: Sequence[Config],
    descriptions: Sequence[dict[str, object]],
    *,
    dry_run: bool,
) -> int:
    """One job array: an element for each run."""
    from dtrain.config import run_folder
    from dtrain.config.composing import commented
    from dtrain.launchers.job import ENDED
    from dtrain.launching import slurm_launcher

    settings = configs[0].launcher
    if any(config.launcher != settings for config in configs):
        raise ConfigError("the elements of a job array are equal to Slurm: launcher.* cannot be swept")
    if len({config.mesh.replicate for config in configs}) > 1 and settings.isolate == "replica":
        raise ConfigError("launcher.isolate=replica needs the same mesh.replicate in every run of a sweep")
    launcher = slurm_launcher(settings, replicas=configs[0].mesh.replicate)
    folders = [run.folder for run in runs]
    command = program("{folder}")
    if dry_run:
        print(launcher.render_array(command, folders=folders, name=base.name))
        for number, (run, config) in enumerate(zip(runs, configs, strict=True)):
            print(f"# ---- element {number}: {run.values} ----\n{commented(config)}")
        return 0
    try:
        launcher.check(folders)
        with contextlib.ExitStack() as refusal:
            for config, description in zip(configs, descriptions, strict=True):
                refusal.enter_context(run_folder.withdrawn_if_refused(Path(config.run.dir)))
                run_folder.write(config, description)
            jobs = launcher.submit_array(command, folders=folders, name=base.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise DtrainError(str(error)) from error
    _write(base, runs)
    print(f"job array {jobs[0].id.partition('_')[0]} ({len(jobs)} runs): {base}")
    if not settings.wait:
        print(f"  dtrain jobs table {base}     dtrain jobs status {jobs[0].id}")
        return 0
    while any(job.state() not in ENDED for job in jobs):
        time.sleep(1)
    print(table(base))
    return 0 if all(job.state() == "finished" for job in jobs) else 1


def _write(base: Path, runs: Sequence[Run]) -> None:
    content = [{"values": run.values, "folder": str(run.folder)} for run in runs]
    (base / FILE).write_text(json.dumps(content, indent=1) + "\n")


def table(base: Path) -> str:
    """The runs of a sweep so far: their values, states and closing figures.

    Raises:
        ConfigError: the folder holds no sweep.
    """
    from dtrain.launchers.job import Facts
    from dtrain.launchers.registry import open_job

    try:
        runs = [Run(entry["values"], Path(entry["folder"])) for entry in json.loads((base / FILE).read_text())]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{base} holds no sweep ({error}); name the folder that `dtrain train -m` printed") from error
    rows: list[tuple[str, ...]] = [("run", "state", *COLUMNS)]
    for run in runs:
        summary: dict[str, object] = {}
        if (run.folder / "summary.json").is_file():
            summary = json.loads((run.folder / "summary.json").read_text())
        if (run.folder / "job.json").is_file():
            state: str = open_job(Facts.read(run.folder)).state()
        else:
            state = "finished" if summary else "not finished"
        rows.append((run.values, state, *(_figure(summary.get(column)) for column in COLUMNS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "-"
