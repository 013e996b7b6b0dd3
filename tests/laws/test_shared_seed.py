"""Shared randomness on every engine: forward passes only, one to the bit on all ranks, resumed, and replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.comm.shared_seed.update_log import read
from dtrain.testing import WorkerPool
from tests.laws.jobs import ENGINES, run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

CHOSEN = ["optim=sgd", "optim.inner.momentum=0", "optim.inner.lr=0.002", "sync.samples=2", "train.steps=10"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_byte_is_enough_on_every_engine(pool: WorkerPool, text: Path, tmp_path: Path, engine: str) -> None:
    """With clipping, warm-up and weight decay as they come; a stop leaves no trace, in the log neither."""
    whole = run(pool, tmp_path / "whole", text, engine, "one_byte", *CHOSEN, f"sync.log={tmp_path / 'log'}")
    run(pool, tmp_path / "half", text, engine, "one_byte", *CHOSEN, f"sync.log={tmp_path / 'half-log'}",
        "train.stop_after_steps=6")  # fmt: skip
    again = run(pool, tmp_path / "half", text, engine, "one_byte", *CHOSEN, f"sync.log={tmp_path / 'half-log'}")
    assert again.losses == whole.losses
    assert again.digest == whole.digest
    logs = [(tmp_path / folder / f"replica-{n}.log").read_bytes() for folder in ("log", "half-log") for n in (0, 1)]
    assert logs == 4 * logs[:1]
    records = read(tmp_path / "log" / "replica-0.log").records
    assert len(records) == 10 and len({record.digest for record in records}) == 10


def test_all_engines_find_much_the_same(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    """Round-off may change a byte, so not to the bit: the loss after ten steps."""
    ended = [run(pool, tmp_path / e, text, e, "one_byte", *CHOSEN).losses[10] for e in ("ddp", "fsdp", "zero3")]
    assert ended == pytest.approx(3 * ended[:1], rel=2e-2)
