"""``dtrain simulate``: syncs on networks of any size, in time that is computed."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import add_config_dir, add_verb, words_of
from dtrain.errors import ConfigError
from dtrain.extras import OF_LAUNCHING, require

if TYPE_CHECKING:
    from dtrain.cli import Verbs
    from dtrain.simulation.sweep import Row

ROWS = "simulation.json"
EPILOG = """\
words, of which several values, or a range A..B of doublings, make a sweep:
  link=100mbit,40ms sites=2 nodes=4     nodes in each site; a link is RATE[/RATE up][,LATENCY one way[/LATENCY up]]
  node_link=10gbit,0.1ms rank_link=... ranks=8 backend=gloo|ring|doubling
  calibrate=FOLDER                      in place of link: what dtrain bench collectives has measured
  parameters=1.2b layers=24             or shapes=FILE, .safetensors or JSON {name: shape}
  step_seconds=0.8 backward=0.67 optimizer_seconds=0 memory_rate=0 one_core=0    of a rank; bytes/s of encoding
  sync=... sync.KEY=... compress=...    as of dtrain train
  engine=module|ddp|fsdp|zero1|zero2|zero3 shards=1 bucket_mib=4
  tokens=100b tokens_per_step=500k      a budget, and what a replica takes in a step
  slow=1x1.5 jitter=0.1                 ranks that take 1.5 times as long; the deviation of each step's logarithm
  failures_per_hour=1 policy=restart|members restart_seconds=300 detect_seconds=10 checkpoint_every_steps=100
  steps=0 seed=0 order=program|data run.dir=FOLDER

examples:
  dtrain simulate link=10mbit..10gbit,40ms nodes=4 parameters=1b layers=24 step_seconds=0.8 sync=diloco
  dtrain simulate link=1gbit,1ms nodes=2..4096 backend=ring parameters=10b layers=48 step_seconds=2
  dtrain simulate calibrate=bench/today nodes=2..16 parameters=20m layers=8 step_seconds=0.4 sync=dense sync=diloco
"""


def add(verbs: Verbs) -> None:
    """Add ``simulate``."""
    verb = add_verb(verbs, "simulate", does="compute step times and utilization on a described network", epilog=EPILOG)
    add_config_dir(verb)
    verb.add_argument("words", nargs="*", metavar="WORD", help="link=..., nodes=..., parameters=..., sync=..., ...")
    verb.set_defaults(run=_run, outlives_reader=True)


def _run(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    from dtrain.simulation.sweep import plain, simulated
    from dtrain.simulation.table import head, line, summary
    from dtrain.train.config import run_folder

    if not chosen.words:
        raise ConfigError("dtrain simulate needs a network, a model and a step; `dtrain simulate --help` has examples")
    words, asked = words_of(chosen), f"simulate-{time.strftime('%Y-%m-%d-%H%M%S')}"
    named = [word.partition("=")[2] for word in words if word.startswith("run.dir=")]
    rows, count, said = simulated([word for word in words if not word.startswith("run.dir=")])
    folder = Path(named[-1]) if named else run_folder.made(Path("runs") / asked)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: {error.strerror}; name another folder") from error
    walked: list[Row] = []
    for row in rows:
        if not walked:
            print(head(list(row.swept)), flush=True)
        print(line(row), flush=True)
        walked.append(row)
        content = {"words": words, "said": list(said), "cells": count, "rows": [plain(done) for done in walked]}
        (folder / ROWS).write_text(json.dumps(content, indent=1) + "\n")
    for text in summary(walked, said):
        print(text)
    print(f"{len(walked)} of {count} cells in {folder / ROWS}")
    return 0
