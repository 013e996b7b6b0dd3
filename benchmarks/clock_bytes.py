"""The report on what the clock says is sent, beside the meters of runs: each sync and compressor on each engine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.harness import Session, say
from benchmarks.page import Check, Report, table
from dtrain.comm.clock.clock import Clock, Engine
from dtrain.comm.clock.network import Network
from dtrain.comm.clock.step import Step
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.meter import Count
from dtrain.testing import WorkerPool
from dtrain.train.config import Config, instantiate
from tests.comm.clock.runs import Sent, composed, sent

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STEPS, RANKS = 7, 4
AT_ONCE = 8
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Pair:
    """Bytes of all ranks of a run, by the meters and by the clock, and whether every count of every rank is equal."""

    metered: int
    clocked: int
    equal: bool


def clock_bytes(session: Session) -> Report:
    """Seven steps of each on 2 replicas x 2 shards."""
    found: dict[str, dict[str, Pair]] = {}
    names = [path.stem for group in ("sync", "compress") for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]
    with WorkerPool(RANKS) as pool, tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.mkdir()
        (text / "all.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
        for engine in ENGINES:
            for start in range(0, len(names), AT_ONCE):
                some = names[start : start + AT_ONCE]
                say(f"{engine}: {', '.join(some)}")
                configs = [composed(engine, name, text, Path(folder) / name) for name in some]
                for name, config, ranks in zip(some, configs, sent(pool, configs, STEPS), strict=True):
                    found.setdefault(name, {})[engine] = compared(config, ranks)
    return bytes_report(found)


def compared(config: Config, ranks: Sequence[Sent]) -> Pair:
    """What the ranks of a run have sent to their peers, beside what the clock says."""
    spec = cast(Sync, instantiate(config.sync, "sync"))
    metered = clocked = 0
    equal = True
    for rank, run in enumerate(ranks):
        held = Engine(config.engine.name, 2, divmod(rank, 2), config.engine.bucket_mib)
        clock = Clock(spec, Step.even(run.shapes, 0.1), Network.of("nodes=2"), engine=held)
        clock.train(STEPS)
        clock.close_round()
        real, walked = to_peers(run.by), to_peers(clock.meter.by)  # type: ignore[arg-type]
        metered += sum(count.bytes for count in real.values())
        clocked += sum(count.bytes for count in walked.values())
        equal = equal and real == walked
    return Pair(metered, clocked, equal)


def to_peers(by: Mapping[tuple[str, str, str], Count]) -> dict[tuple[str, str], Count]:
    """What went over the slow links, by label and op."""
    return {(label, op): count for (axis, label, op), count in by.items() if axis == "replicate"}


def bytes_report(found: Mapping[str, Mapping[str, Pair]]) -> Report:
    """By sync and engine."""
    cells = [pair for engines in found.values() for pair in engines.values()]
    exact = sum(pair.equal for pair in cells)
    rows = [[name, *(_cell(engines[engine]) for engine in ENGINES)] for name, engines in found.items()]
    body = (
        f"{STEPS} steps and the end of a round on 2 replicas x 2 shards of a model of two blocks, set-up included: "
        "what the four ranks have sent to their peers, in bytes, by the run's meters. Where the clock has these and as "
        "many messages, of every rank, label and kind of op, the cell says no more; elsewhere the clock's bytes "
        "follow in brackets. Compressors are those of `sync=every_step`. What accordion and L-GreCo send depends on "
        "values, which the clock does not have.\n\n" + table(["sync", *ENGINES], rows)
    )
    check = Check("cells in which every count is equal", f"{exact} of {len(cells)}", "all", exact == len(cells))
    figures = {name: {engine: [p.metered, p.clocked, p.equal] for engine, p in engines.items()}
               for name, engines in found.items()}  # fmt: skip
    return Report("Bytes by the clock and by the meter", body, ("python -m benchmarks clock_bytes",), (check,), figures)


def _cell(pair: Pair) -> str:
    return f"{pair.metered:,}" + ("" if pair.equal else f" ({pair.clocked:,})")
