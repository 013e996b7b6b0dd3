"""``dtrain bench``: what communication costs on this network."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.commands import add_verb
from dtrain.commands.entering import enter_launcher
from dtrain.errors import INTERRUPTED, ConfigError, DtrainError

if TYPE_CHECKING:
    from dtrain.bench.rows import Row
    from dtrain.bench.settings import Settings
    from dtrain.commands import Verbs
    from dtrain.launchers.job import Job

EPILOG = """\
settings:
  bench.ops=all_reduce,all_gather,reduce_scatter,all_to_all,broadcast     torch's own collectives (the default)
            comm.all_reduce,comm.all_gather,comm.all_to_all,comm.broadcast,comm.shift     the ops of dtrain's channel
  bench.min_bytes=4K bench.max_bytes=16M bench.factor=4     sizes of the whole buffer
  bench.iterations=20 bench.seconds=3 bench.warmup=2 bench.dtype=float32 bench.link_mbit=1000
  bench.transport=mpi     with launcher=mpi, for the ops of comm

examples:
  dtrain bench collectives launcher.workers=4
  dtrain bench collectives launcher=slurm launcher.nodes=4 launcher.workers=4 run.dir=bench/today
  dtrain bench collectives launcher.workers=4 --baseline bench/today/rows.jsonl
"""


def add(verbs: Verbs) -> None:
    """Add ``bench collectives``."""
    below = add_verb(verbs, "bench", does="measure communication").add_subparsers(required=True, metavar="VERB")
    collectives = add_verb(below, "collectives", does="sweep collectives over message sizes", epilog=EPILOG)
    collectives.add_argument(
        "--baseline", type=Path, metavar="ROWS", help="rows.jsonl of an older sweep to compare with"
    )
    collectives.add_argument("words", nargs="*", metavar="OVERRIDE", help="bench.KEY=..., launcher=..., run.dir=FOLDER")
    collectives.set_defaults(run=_collectives)


def _collectives(chosen: argparse.Namespace) -> int:
    from dtrain.bench import rows
    from dtrain.bench.ops import OPS
    from dtrain.bench.settings import parse
    from dtrain.config import compose
    from dtrain.launching import build_launcher

    settings, words = parse(chosen.words, OPS)
    for word in words:
        if not word.lstrip("+").startswith(("launcher", "run.dir=")):
            raise ConfigError(f"{word}: bench takes bench.KEY=..., launcher=..., launcher.KEY=... and run.dir=FOLDER")
    baseline = rows.read(chosen.baseline) if chosen.baseline else []
    if chosen.baseline and not baseline:
        raise ConfigError(f"{chosen.baseline} has no rows; give the rows.jsonl of a sweep")
    config = compose(words)
    enter_launcher(config.launcher, sys.argv[1:])
    folder = Path(config.run.dir).absolute()
    if not any(word.startswith("run.dir=") for word in words):
        folder = folder.with_name(folder.name.rpartition("-")[0] + "-bench")
    launcher = build_launcher(config.launcher)
    settings = _with_link(settings) if config.launcher.nodes > 1 else settings
    settings.write(folder)
    (folder / "rows.jsonl").unlink(missing_ok=True)
    try:
        job = launcher.submit(["python", "-m", "dtrain.bench.worker", str(folder)], folder=folder, name="bench")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise DtrainError(str(error)) from error
    return _show(job, folder, baseline)


def _with_link(settings: Settings) -> Settings:
    """The rate of the links of a cluster of `dtrain cluster`, where nobody has said another."""
    import dataclasses

    state = Path("/run/dtrain") / os.environ.get("DTRAIN_CLUSTER", "") / "cluster.json"
    if settings.link_mbit or not state.is_file():
        return settings
    rates = [rate for host, rate in json.loads(state.read_text())["rates"].items() if host != "login"]
    return dataclasses.replace(settings, link_mbit=min(rate or 0 for rate in rates) / 1e6)


def _show(job: Job, folder: Path, baseline: Sequence[Row]) -> int:
    """Print rows as they come; Ctrl-C keeps those that there are."""
    from dtrain.bench import rows, table
    from dtrain.commands.following import exit_code
    from dtrain.launchers.job import ENDED

    print(f"job {job.id}: {folder}\n{table.HEAD}", flush=True)
    shown, code = 0, 0
    try:
        ended = False
        while not ended:
            ended = job.state() in ENDED
            found = rows.read(folder / "rows.jsonl")
            for row in found[shown:]:
                print(table.line(row), flush=True)
            shown = len(found)
            time.sleep(0 if ended else 0.3)
        code = exit_code(job)
    except KeyboardInterrupt:
        job.cancel()
        code = INTERRUPTED
    found = rows.read(folder / "rows.jsonl")
    print("\n".join(table.summary(found)))
    for row, times in rows.slower(found, baseline):
        print(f"slower than the baseline: {row.op} of {row.bytes:,} bytes takes {times:.2f} times as long")
    print(f"rows: {folder / 'rows.jsonl'}")
    return code or int(any(row.wrong for row in found))
