"""Memory by term: published formulas in their limits, and what torch's trackers count of the engines themselves.

`benchmarks/plan_memory.py` compares more models, DeepSpeed among them, and whole processes.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

from dtrain.plan.describe import Description, describe
from dtrain.plan.memory import Memory, optimizer_memory, replayed
from dtrain.plan.placement import Placement
from dtrain.plan.sync_memory import SyncMemory
from tests.plan.test_describe import BATCH, LENGTH, SPECS, build

ADAMW = partial(optimizer_memory, torch.optim.AdamW)


@cache
def described(casts: str = "none", checkpointed: bool = False) -> Description:
    return describe(build, SPECS, casts=casts, checkpointed=checkpointed)  # type: ignore[arg-type]


def memory(engine: str, shards: int = 2, *, bf16: bool = False, checkpointed: bool = False, microbatches: int = 1,
           sync: SyncMemory | None = None) -> Memory:  # fmt: skip
    casts = "none" if not bf16 else "autocast" if engine == "ddp" else "model"
    placement = Placement(shards=shards, bf16=bf16, bucket_mib=0.01, microbatches=microbatches, exchanged=False)
    return replayed(described(casts, checkpointed), engine, placement, ADAMW, sync or SyncMemory({}, {}, False))


def test_resident_bytes_are_those_of_the_zero_paper() -> None:
    """Rajbhandari et al. 2020, section 3 and figure 1, in fp32: 4 + 4 + 8 bytes an element, sharded stage by stage."""
    numel, shards = described().numel, 4
    assert memory("ddp", shards).resident == pytest.approx(16 * numel, rel=0.01)
    assert memory("fsdp", shards).resident == pytest.approx(12 * numel / shards, rel=0.02)
    assert memory("zero1", shards).resident == pytest.approx((4 + 12 / shards) * numel, rel=0.02)
    bf16 = memory("zero2", shards, bf16=True).resident
    assert bf16 == pytest.approx((2 + 12 / shards) * numel, rel=0.02)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_terms_sum_to_the_peak_and_none_is_negative(engine: str) -> None:
    for bf16, checkpointed, microbatches in ((False, False, 1), (True, True, 1), (True, False, 3)):
        found = memory(engine, bf16=bf16, checkpointed=checkpointed and engine != "zero3", microbatches=microbatches)
        assert sum(found.terms.values()) == found.peak
        assert min(found.terms.values()) >= 0


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2", "zero3"])
def test_more_shards_take_no_more(engine: str) -> None:
    peaks = [memory(engine, shards).resident for shards in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_what_a_sync_keeps_is_added() -> None:
    kept = SyncMemory({"outer parameters": 1000, "in flight": 500}, {"outer parameters": 1000}, False)
    alone, beside = memory("ddp"), memory("ddp", sync=kept)
    assert beside.peak == alone.peak + 1500
    assert beside.resident == alone.resident + 1000


def test_what_an_exchange_of_gradients_holds_comes_with_them() -> None:
    size = 10**9
    exchanged, waiting = (memory("ddp", sync=SyncMemory({"in flight": size}, {}, by)) for by in (True, False))
    assert size < exchanged.peak < waiting.peak


def test_the_exchange_between_steps_may_be_the_peak() -> None:
    kept = SyncMemory({}, {"in flight": 10**9}, False)
    found = memory("ddp", sync=kept)
    assert found.during == "exchange between steps"
    assert found.terms["in flight"] == 10**9


def test_sgd_keeps_less_than_adamw_and_temporaries_are_counted() -> None:
    shapes = [(100, 10), (7,)]
    sgd = optimizer_memory(lambda parameters: torch.optim.SGD(parameters, lr=0.1), shapes)
    momentum = optimizer_memory(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), shapes)
    adamw = ADAMW(shapes)
    assert sgd.state == 0
    assert momentum.state == 4 * 1007
    assert adamw.state == pytest.approx(8 * 1007, abs=16)
    assert adamw.temporaries == 8 * 1000  # the root of a moment and its quotient, of the largest parameter
    on_gpu = optimizer_memory(torch.optim.AdamW, shapes, together=True)
    assert on_gpu.state == adamw.state
    assert on_gpu.temporaries == pytest.approx(4 * 1007, abs=64)  # the root of all moments


def test_batches_are_what_they_were_described_with() -> None:
    assert described().microbatch == BATCH
    assert described().input_bytes == 2 * 8 * BATCH * LENGTH
