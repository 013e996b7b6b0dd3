"""``dtrain train -m key=a,b``: a run for each combination of values; one job array under Slurm, one table."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from dtrain.cli.login_host import enter_launcher
from dtrain.cli.submit import refusals, warn, worker
from dtrain.errors import ConfigError
from dtrain.launchers.exit_codes import INTERRUPTED, RUN_AGAIN
from dtrain.launchers.job_list import SWEEP

if TYPE_CHECKING:
    from dtrain.launchers.launcher import ArrayLauncher
    from dtrain.train.config import Config

FILE = SWEEP
MOST_RUNS = 10_000


class Train(Protocol):
    """`dtrain.cli.train.train`."""

    def __call__(self, words: Sequence[str], *, dry_run: bool = False) -> int:
        """Train as these overrides say; returns the exit code."""


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
        ConfigError: a word that cannot be read, none that has several values, or too many combinations.
    """
    from dtrain.train.config.composition import alternatives

    values_of_words = alternatives(words)
    fixed = [values[0] for values in values_of_words if len(values) == 1]
    swept = [values for values in values_of_words if len(values) > 1]
    if not swept:
        raise ConfigError(
            "train -m needs a key with several values on the command line, as in train.seed=1,2,3 (those of a file are "
            "one value each)"
        )
    if (count := math.prod(map(len, swept))) > MOST_RUNS:
        raise ConfigError(f"these are {count:,} combinations; a sweep has at most {MOST_RUNS:,} runs")
    return [(",".join(chosen), [*fixed, *chosen]) for chosen in itertools.product(*swept)]


def sweep(words: Sequence[str], train: Train, *, dry_run: bool) -> int:
    """Run, or submit, every combination; returns the exit code. ``train`` runs one that is no element of an array."""
    from dtrain.train.config import compose, run_folder, validate
    from dtrain.train.config.composition import compose_named
    from dtrain.train.config.words import written

    chosen = combinations(words)
    first, named = compose_named(chosen[0][1], name="sweep")
    base = Path(first.run.dir).absolute()
    stored = _stored(base) if (base / FILE).exists() else []
    runs = _placed(base, [values for values, _ in chosen], stored)
    places = [written("run.dir", str(run.folder)) for run in runs]
    commands = [[*overrides, place] for place, (_, overrides) in zip(places, chosen, strict=True)]
    configs = [run_folder.absolute(compose(command)) for command in commands]
    enter_launcher(configs[0].launcher, sys.argv[1:], dry_run=dry_run)
    descriptions = [validate(config) for config in configs]
    if not (dry_run or named) and (unused := run_folder.made(base)) != base:
        return sweep(
            [*words, written("run.dir", str(unused))], train, dry_run=False
        )  # another began at the same moment
    everything = list({run.folder: run for run in (*stored, *runs)}.values())
    if configs[0].launcher.arrays:
        return _array(base, runs, everything, configs, descriptions, dry_run=dry_run)
    if dry_run:
        for run, command in zip(runs, commands, strict=True):
            print(f"---- {run.values} ----", flush=True)
            train(command, dry_run=True)
        return 0
    _write(base, everything)
    codes = []
    for run, command in zip(runs, commands, strict=True):
        print(f"---- {run.values} ----", flush=True)
        codes.append(train(command))
        if codes[-1] in (INTERRUPTED, RUN_AGAIN):
            left = len(runs) - len(codes)
            print(
                f"the sweep ends here; the same command, with run.dir={base}, goes on with {run.values}, {left} to come"
            )
            break
    _show(base, report=configs[0].run.report)
    return codes[-1] if codes[-1] in (INTERRUPTED, RUN_AGAIN) else max(codes)


def _placed(base: Path, combinations: Sequence[str], stored: Sequence[Run]) -> list[Run]:
    """A folder for each combination: the one from an earlier run of the sweep, else one of a plain name."""
    folders = {run.values: run.folder for run in stored}
    taken = {run.folder for run in stored}
    runs = []
    for number, values in enumerate(combinations):
        folder = folders.get(values)
        while folder is None:
            candidate = base / f"{number}-{_plain(values)}"
            if candidate not in taken:
                folder = candidate
            number += 1
        taken.add(folder)
        runs.append(Run(values, folder))
    return runs


def _plain(values: str) -> str:
    """The values as part of the name of a folder, which needs no quotes and leads nowhere else.

    >>> _plain("sync=dense,data.path=../ü b")
    'sync-dense-data.path-..-b'
    """
    return re.sub(r"[^A-Za-z0-9._+]+", "-", values).strip("-.")[:100] or "run"


def _array(
    base: Path,
    runs: Sequence[Run],
    everything: Sequence[Run],
    configs: Sequence[Config],
    descriptions: Sequence[dict[str, object]],
    *,
    dry_run: bool,
) -> int:
    """One job array: an element for each run. ``everything``: these runs, and those that the sweep had before."""
    from dtrain.launchers.job import ENDED
    from dtrain.train.config import run_folder
    from dtrain.train.config.composition import commented

    launcher = cast("ArrayLauncher", configs[0].launcher)
    replicas = configs[0].mesh.replicate
    if any(config.launcher != launcher for config in configs):
        raise ConfigError("the elements of a job array are equal to Slurm: launcher.* cannot be swept")
    if len({config.mesh.replicate for config in configs}) > 1 and launcher.same_replicas:
        raise ConfigError("launcher.isolate=replica needs the same mesh.replicate in every run of a sweep")
    warn(launcher.warnings())
    folders = [run.folder for run in runs]
    command = worker("{folder}")
    if dry_run:
        print(launcher.render_array(command, folders=folders, name=base.name, replicas=replicas))
        for number, (run, config) in enumerate(zip(runs, configs, strict=True)):
            print(f"# ---- element {number}: {run.values} ----\n{commented(config)}")
        return 0
    with refusals():
        launcher.check(folders)
        with contextlib.ExitStack() as refusal:
            for config, description in zip(configs, descriptions, strict=True):
                refusal.enter_context(run_folder.locked(Path(config.run.dir)))
                refusal.enter_context(run_folder.withdrawn_if_refused(Path(config.run.dir)))
                run_folder.write(config, description)
            jobs = launcher.start_array(command, folders=folders, name=base.name, replicas=replicas)
    _write(base, everything)
    print(f"job array {jobs[0].id.partition('_')[0]} ({len(jobs)} runs): {base}")
    if not launcher.wait:
        print(f"  dtrain jobs table {base}     dtrain jobs status {jobs[0].id}")
        return 0
    while any(job.state() not in ENDED for job in jobs):
        time.sleep(1)
    _show(base, report=configs[0].run.report)
    return 0 if all(job.state() == "finished" for job in jobs) else 1


def _write(base: Path, runs: Sequence[Run]) -> None:
    from dtrain.train.checkpoint.folders import OWNERS, write_text_durably

    content = [{"values": run.values, "folder": str(run.folder)} for run in runs]
    try:
        base.mkdir(parents=True, exist_ok=True)
        write_text_durably(base / FILE, json.dumps(content, indent=1) + "\n", mode=OWNERS)
    except OSError as error:
        raise ConfigError(f"run.dir={base} cannot be written to: {error}; choose another run.dir") from error


def _stored(base: Path) -> list[Run]:
    """The runs of a sweep; one that was moved with its folder is found there.

    Raises:
        ConfigError: the folder holds no sweep, or a damaged one.
    """
    from dtrain.launchers.strict_json import json_in

    content = json_in(base / FILE)
    if content is None and not (base / FILE).exists():
        raise ConfigError(f"{base} holds no sweep; name the folder that `dtrain train -m` printed")
    runs = []
    for entry in content if isinstance(content, list) else [None]:
        values, folder = (entry.get("values"), entry.get("folder")) if isinstance(entry, dict) else (None, None)
        name = Path(folder).name if isinstance(folder, str) else ""
        if not isinstance(values, str) or name in ("", ".."):
            raise ConfigError(f"{base / FILE} is damaged; delete it and give the command of the sweep again")
        location = Path(str(folder)).resolve()
        # Runs must be below their sweep, whatever its file says: what is read there is shown, and trained on.
        runs.append(Run(values, location if base.resolve() in location.parents else base / name))
    return runs


def _show(base: Path, *, report: bool) -> None:
    """Print the table, and draw the page."""
    from dtrain.report.at_the_end import write_sweep

    print(table(base))
    if report:
        print(write_sweep(base, [(run.values, run.folder) for run in _stored(base)]))


def table(base: Path) -> str:
    """The runs of a sweep so far: their values, states and closing figures.

    Raises:
        ConfigError: the folder holds no sweep.
    """
    from dtrain.report.comparing import compared

    return compared([(run.values, run.folder) for run in _stored(base)])
