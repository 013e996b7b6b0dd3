"""On every engine the clock sends, rank by rank, what a run of 2 replicas x 2 shards sends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from dtrain.comm.clock.clock import Clock, Engine
from dtrain.comm.clock.network import Network
from dtrain.comm.clock.step import Step
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.meter import Count
from dtrain.testing import WorkerPool
from dtrain.train.config import instantiate
from tests.comm.clock.runs import composed, sent

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

STEPS = 7
OF_ENGINE = {
    "ddp": ("dense", "topk_ef", "powersgd_ef", "onebit_adam", "muloco"),
    "fsdp": ("powersgd_ef", "post_local_sgd"),
    "zero1": ("int8_ef",),
    "zero2": ("powersgd_ef",),
    "zero3": ("streaming_diloco",),
}


@pytest.mark.parametrize("engine", OF_ENGINE)
def test_a_rank_sends_to_its_peers_what_the_clock_says(pool: WorkerPool, tmp_path: Path, engine: str) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "all.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    configs = [composed(engine, sync, text, tmp_path / sync) for sync in OF_ENGINE[engine]]
    for sync, config, ranks in zip(OF_ENGINE[engine], configs, sent(pool, configs, STEPS), strict=True):
        for rank in (0, 3):  # a broadcast's source, and the shorter end of each parameter
            run = ranks[rank]
            spec = cast(Sync, instantiate(config.sync, "sync"))
            held = Engine(engine, 2, divmod(rank, 2), config.engine.bucket_mib)
            clock = Clock(spec, Step.even(dict(run.shapes), 0.1), Network.of("nodes=2"), engine=held)
            clock.train(STEPS)
            clock.close_round()
            assert to_peers(clock.meter.by) == to_peers(run.by), f"{sync}, rank {rank}"  # type: ignore[arg-type]


def to_peers(by: Mapping[tuple[str, str, str], Count]) -> dict[tuple[str, str], Count]:
    """What went over the slow links, by label and op."""
    return {(label, op): count for (axis, label, op), count in by.items() if axis == "replicate"}
