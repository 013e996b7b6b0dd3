"""``dtrain bench``: what communication costs on this network."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import LAUNCHER_WORDS, add_config_dir, add_verb, bench_train, words_of
from dtrain.cli.bench_rows import Shown, show_rows
from dtrain.cli.login_host import enter_launcher
from dtrain.cli.submit import refusals, require_sound, warn
from dtrain.errors import ConfigError
from dtrain.extras import OF_LAUNCHING, require

if TYPE_CHECKING:
    from dtrain.bench.rows import Row
    from dtrain.bench.settings import Settings
    from dtrain.cli import Verbs
    from dtrain.launchers.job import Job
    from dtrain.launchers.launcher import Launcher

EPILOG = """\
settings:
  bench.ops=all     native: torch's all_reduce,all_gather,reduce_scatter,all_to_all,broadcast; comm: those of dtrain's
                    channel, comm.all_reduce,comm.all_gather,comm.all_to_all,comm.broadcast,comm.shift; or some by name
  bench.min_bytes=4K bench.max_bytes=16M bench.factor=4     sizes of the whole buffer, K is 1000
  bench.iterations=20 bench.seconds=3     a row ends after either
  bench.warmup=2 bench.dtype=float32
  bench.link=auto     the rate of a link: 100mbit, 1gbit, none; auto knows that of dtrain cluster
  bench.transport=auto     what carries the ops of comm: torch (gloo, or NCCL on GPUs), mpi; auto: mpi with launcher=mpi

examples:
  dtrain bench collectives launcher.workers=4
  dtrain bench collectives launcher=slurm launcher.nodes=4 launcher.workers=4 run.dir=bench/today
  dtrain bench collectives launcher=slurm launcher.nodes=4 launcher.workers=4 --baseline bench/today/rows.jsonl
  dtrain bench collectives launcher=mpi launcher.workers=2 bench.ops=comm
"""


HOOKS_EPILOG = """\
settings:
  bench.ops=all     torch: torch.all_reduce,torch.fp16,torch.bf16,torch.powersgd; dtrain: every choice of the group
                    compress, those that can on an all-reduce too (bf16:all_reduce), and sparse ones on each of their
                    routes (topk_ef:all_gather); or by name
  bench.min_bytes=4M bench.max_bytes=4M bench.factor=4     sizes of the fp32 gradient, K is 1000
  bench.iterations=20 bench.seconds=3 bench.warmup=4 bench.link=auto     as of `dtrain bench collectives`

examples:
  dtrain bench hooks launcher.workers=4
  dtrain bench hooks launcher=slurm launcher.nodes=4 launcher.workers=4 bench.ops=torch,int8_ef,powersgd_ef
"""


def add(verbs: Verbs) -> None:
    """Add ``bench collectives``, ``bench hooks`` and ``bench train``."""
    below = add_verb(verbs, "bench", does="measure communication").add_subparsers(required=True, metavar="VERB")
    for name, does, epilog, run in (
        ("collectives", "sweep collectives over message sizes", EPILOG, _collectives),
        ("hooks", "compare what exchanges gradients: torch's hooks and every compressor", HOOKS_EPILOG, _hooks),
    ):
        verb = add_verb(below, name, does=does, epilog=epilog)
        verb.add_argument(
            "--baseline", type=Path, metavar="ROWS", help="rows.jsonl of an older sweep to compare with, or its folder"
        )
        add_config_dir(verb)
        verb.add_argument("words", nargs="*", metavar="OVERRIDE", help="bench.KEY=..., launcher=..., run.dir=FOLDER")
        verb.set_defaults(run=run, outlives_reader=True)
    does = "compare syncs in training: time of a step, and loss after equal tokens and equal time"
    verb = add_verb(below, "train", does=does, epilog=bench_train.EPILOG)
    add_config_dir(verb)
    verb.add_argument("words", nargs="*", metavar="OVERRIDE", help="bench.KEY=..., and what dtrain train takes")
    verb.set_defaults(run=bench_train.run, outlives_reader=True)


def _collectives(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    from dtrain.bench import table
    from dtrain.bench.ops import GROUPS
    from dtrain.bench.rows import Row
    from dtrain.bench.settings import parse

    settings, words = parse(words_of(chosen), GROUPS)
    baseline = _baseline(chosen.baseline, Row)
    job, folder = _submitted("collectives", settings, words)
    return show_rows(
        job,
        folder,
        Shown(
            Row,
            table.HEAD,
            lambda row, _: table.line(row),
            lambda rows: [*table.summary(rows), *_compared(rows, baseline)],
            table.report,
        ),
    )


def _hooks(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    from dtrain.bench import hook_rows
    from dtrain.bench.hook_rows import HookRow
    from dtrain.bench.hooks import GROUPS
    from dtrain.bench.settings import parse

    sizes = [word for word in ("bench.min_bytes=4M", "bench.max_bytes=4M") if not _names(word, chosen.words)]
    settings, words = parse([*sizes, *words_of(chosen)], GROUPS)
    if settings.transport == "mpi" or settings.dtype != "float32":
        raise ConfigError("bench hooks exchanges gradients in fp32 over torch.distributed: leave both settings out")
    baseline = _baseline(chosen.baseline, HookRow)
    job, folder = _submitted("hooks", dataclasses.replace(settings, transport="torch"), words)
    return show_rows(
        job,
        folder,
        Shown(
            HookRow,
            hook_rows.HEAD,
            hook_rows.line,
            lambda rows: [*hook_rows.summary(rows), *_compared(rows, baseline)],
            hook_rows.report,
        ),
    )


def _names(word: str, words: Sequence[str]) -> bool:
    """Whether ``words`` set the same key."""
    return any(candidate.partition("=")[0] == word.partition("=")[0] for candidate in words)


def _submitted(what: str, settings: Settings, words: Sequence[str]) -> tuple[Job, Path]:
    """The job that measures, and its folder."""
    from dtrain.bench.settings import FILE
    from dtrain.train.config import run_folder
    from dtrain.train.config.composition import compose_named

    for word in words:
        if not word.lstrip("+").startswith(LAUNCHER_WORDS):
            raise ConfigError(f"{word}: bench takes bench.KEY=..., launcher=..., launcher.KEY=..., run.dir=..., @FILE")
    config, named = compose_named(words, name="bench")
    settings = _completed(settings, config.launcher)
    enter_launcher(config.launcher, sys.argv[1:])
    folder = Path(config.run.dir).absolute()
    # A restart would fail again, and write its rows twice.
    launcher = config.launcher.replaced(max_restarts=0)
    require_sound(launcher)
    warn(launcher.warnings())
    with refusals():
        launcher.check([folder])
        if not named:
            folder = run_folder.made(folder)
        program = ["python", "-m", "dtrain.bench.worker", what, str(folder / FILE)]
        with run_folder.locked(folder):
            settings.write(folder)
            (folder / "rows.jsonl").unlink(missing_ok=True)
            return launcher.start(program, folder=folder, name="bench"), folder


def _baseline(path: Path | None, kind: type[Row]) -> Sequence[Row]:
    """The rows of an older sweep; none if it is not asked for."""
    from dtrain.bench import rows

    if path is None:
        return []
    try:
        older = rows.read_as(path / "rows.jsonl" if path.is_dir() else path, kind)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--baseline: {error}") from error
    if not older:
        raise ConfigError(f"--baseline {path} has no rows; give the rows.jsonl of a sweep, or its folder")
    return older


def _compared(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """What is slower than in an older sweep, where one was given."""
    from dtrain.bench import table

    return table.compared(rows, baseline) if baseline else []


def _completed(settings: Settings, launcher: Launcher) -> Settings:
    """The settings, with "auto" resolved."""
    import dataclasses

    transport, link = settings.transport, settings.link
    if transport == "auto":
        transport = "mpi" if launcher.has_mpi else "torch"
    if transport == "mpi" and not launcher.has_mpi:
        raise ConfigError(f"bench.transport=mpi, but launcher={launcher.name} starts ranks without MPI: launcher=mpi")
    if link == "auto":
        link = "none" if launcher.one_machine else _cluster_link()
    return dataclasses.replace(settings, transport=transport, link=link)


def _cluster_link() -> str:
    """The slowest link of the `dtrain cluster` that this is a host of, or "none" where it is unlimited or unknown."""
    from dtrain.launchers.environment import CLUSTER
    from dtrain.slurm.devcluster.state import Facts

    try:
        facts = Facts.read(os.environ.get(CLUSTER, ""))
    except OSError:
        return "none"
    except ValueError as error:
        raise ConfigError(f"{error}; name the link yourself: bench.link=100mbit, or none") from error
    rates = [rate for host, rate in facts.rates.items() if host != "login" and rate]
    return f"{min(rates) / 1e3:f}kbit" if rates else "none"
