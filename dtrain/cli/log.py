"""``dtrain log``: what an update log holds, whether it is whole, and the weights that it makes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import add_verb
from dtrain.errors import DtrainError

if TYPE_CHECKING:
    from torch import Tensor

    from dtrain.cli import Verbs
    from dtrain.comm.shared_seed.update_log import Contents

EPILOG = """\
A log is written by sync=one_byte with sync.log=FOLDER. WEIGHTS is a safetensors file, such as a run's
export/model.safetensors, or a checkpoint, RUN/checkpoints/step-N: the first weights of the run or any later ones.

examples:
  dtrain log info runs/x/log/replica-0.log
  dtrain log verify runs/x/log/replica-0.log --weights runs/x/checkpoints/step-0000000100
  dtrain log replay runs/x/log/replica-0.log --weights base.safetensors --steps 500 --out at-500.safetensors

Digests of a log (16 digits) are sums over every bit, equal for every sharding; replay also tells the
parameters_digest (SHA-256) that the run's summary.json has.
"""


def add(verbs: Verbs) -> None:
    """Add ``log`` and its verbs."""
    parser = add_verb(verbs, "log", does="read, verify or replay the update log of a run", epilog=EPILOG)
    below = parser.add_subparsers(metavar="VERB", required=True)
    info = add_verb(below, "info", does="print what a log holds")
    verify = add_verb(below, "verify", does="check every record; with weights, replay and compare every digest")
    replay = add_verb(below, "replay", does="write the weights that a log makes")
    for verb, run in ((info, _info), (verify, _verify), (replay, _replay)):
        verb.add_argument("log", metavar="LOG", type=Path)
        verb.set_defaults(run=run)
    verify.add_argument("--weights", type=Path)
    replay.add_argument("--weights", type=Path, required=True)
    replay.add_argument("--steps", type=int, help="replay steps below this one only (default: all)")
    replay.add_argument("--out", type=Path, required=True, help="a safetensors file to write")


def _info(chosen: argparse.Namespace) -> int:
    log = _read(chosen.log)
    walk, records = log.header.walk, log.records
    elements = sum(math.prod(shape) for shape in log.header.shapes.values())
    print(f"{len(log.header.shapes)} parameters, {elements:,} elements; first weights {log.header.first:016x}")
    print(f"key {walk.key}, {walk.samples} directions of {walk.noise} {walk.seeds}, combined by {walk.rule}")
    print(f"generator {log.header.generator} ({log.header.golden}), code {log.header.code}")
    if records:
        first, last = records[0].step, records[-1].step
        sent = sum(len(record.step.codes) for record in records)
        print(f"steps {first.number} to {last.number}: {len(records)} records, {sent:,} bytes of {log.whole_bytes:,}")
        for start, stop in log.gaps():
            print(f"  steps {start} to {stop} are missing")
        members = None
        for record in records:
            step = record.step
            if (step.epoch, step.workers) != members:
                members = step.epoch, step.workers
                print(f"  from step {step.number}: machines {', '.join(map(str, step.workers))}")
        print(f"weights after step {last.number}: {records[-1].digest:016x}")
    else:
        print("no steps yet")
    _print_torn(log)
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    log = _read(chosen.log)
    print(f"{len(log.records)} records, every checksum right")
    _print_torn(log)
    if missing := log.gaps():
        listed = ", ".join(f"{first} to {last}" for first, last in missing)
        raise DtrainError(f"{chosen.log} is not whole: the records of steps {listed} are missing; take another copy")
    if chosen.weights is not None:
        _, first, end = _replayed(log, chosen.weights, None)
        if log.records and first == end:
            raise DtrainError(
                f"nothing was replayed: {chosen.weights} holds the weights after the last step, {end - 1}; give the "
                "run's first weights, or a checkpoint before that"
            )
        if log.records and first > log.records[0].step.number:
            print(f"steps {log.records[0].step.number} to {first - 1}: before these weights, so not replayed")
        print(f"steps {first} to {end}: replayed, every digest as in the log")
    return 0


def _replay(chosen: argparse.Namespace) -> int:
    from dtrain.train.checkpoint import tensors
    from dtrain.train.checkpoint.export import digest

    if chosen.out.exists():
        raise DtrainError(f"{chosen.out} exists; name another file, or remove it")
    values, first, end = _replayed(_read(chosen.log), chosen.weights, chosen.steps)
    if chosen.steps is not None and end < chosen.steps:
        raise DtrainError(f"{chosen.log} ends after {end} steps, and --steps is {chosen.steps}; give no more")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    tensors.save(chosen.out, values, {tensors.DIGEST: tensors.tensors_digest(values)})
    print(f"steps {first} to {end} replayed; {chosen.out} has the parameters_digest {digest(values)}")
    return 0


def _read(path: Path) -> Contents:
    from dtrain.comm.shared_seed.update_log import LogError, read

    if path.is_dir():
        logs = ", ".join(sorted(file.name for file in path.glob("*.log"))) or "none"
        raise DtrainError(f"{path} is a folder; give one of its logs ({logs})")
    try:
        return read(path)
    except (OSError, LogError) as error:
        raise DtrainError(str(error)) from error


def _replayed(log: Contents, path: Path, steps: int | None) -> tuple[dict[str, Tensor], int, int]:
    from dtrain.comm.shared_seed.replay import replay
    from dtrain.comm.shared_seed.update_log import LogError
    from dtrain.train.checkpoint.weights import weights_of

    weights = weights_of(path, log.header.shapes)
    if log.header.shapes.keys() <= weights.keys():  # else replay() says which are missing
        weights = {name: weights[name] for name in log.header.shapes}  # without buffers
    try:
        return replay(log, weights, steps)
    except LogError as error:
        raise DtrainError(str(error)) from error


def _print_torn(log: Contents) -> None:
    if log.torn_bytes:
        print(f"{log.torn_bytes} bytes of a record that a crash tore off follow; the run cuts them when it goes on")
