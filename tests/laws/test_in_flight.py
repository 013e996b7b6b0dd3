"""Local updates with something under way: a stop at every single step of two rounds leaves no trace, on real engines.

One run writes a checkpoint after every step. From each of them another run goes on to the end, in the same processes,
and ends where the first one did: its losses, and every element of what it exports.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dtrain.comm.runtime.loop import LocalUpdateLoop
from dtrain.comm.runtime.method import Sync
from dtrain.testing import WorkerPool
from dtrain.train.checkpoint.folders import step_name
from dtrain.train.config import compose, instantiate
from dtrain.train.engines import EngineOptions, build_engine
from dtrain.train.mesh import build_mesh
from tests.laws.jobs import ENGINES, SMALL, run
from tests.laws.test_special_cases import Small

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

INT4 = "{_target_:dtrain.compress.quantize,bits:4,block:64}"
METHODS = {
    # Two blocks and the rest make three fragments.
    "streaming_diloco": (
        "sync.every_steps=4", "sync.overlap_steps=2",
        f"sync.compress={{_target_:dtrain.compress.error_feedback,compressor:{INT4}}}",
    ),
    "co2": ("sync.every_steps=3",),
    "a warm-up in few bits, and rounds that differ": (
        "sync.every_steps={_target_:dtrain.rounds.lengths,each:[3,4]}", "sync.warmup_steps=3",
        f"sync.compress={{_target_:dtrain.compress.error_feedback,compressor:{INT4}}}", "sync.warmup_compress=same",
    ),
}  # fmt: skip
ROUNDS = {"streaming_diloco": 2 * 4 + 2 + 2, "co2": 2 * 3 + 2, "a warm-up in few bits, and rounds that differ": 3 + 7}
"""Steps until every fragment has been merged twice."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_a_stop_at_any_step_leaves_no_trace(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str, method: str
) -> None:
    sync = "co2" if method == "co2" else "streaming_diloco"
    leaves_no_trace(pool, text, tmp_path, engine, sync, METHODS[method], ROUNDS[method])
    assert fragments_under_way(tmp_path / "whole", ROUNDS[method] - 1)


@pytest.mark.parametrize(
    ("sync", "words", "steps"),
    [
        ("int2_ef", ("sync.lossless=1",), 4),
        ("diloco", ("compress=int2_ef", "sync.lossless=1", "sync.every_steps=3"), 2 * 3 + 1),
    ],
    ids=["gradients", "deltas"],
)
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero3"])
def test_a_stop_at_any_step_loses_nothing_of_few_bits(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str, sync: str, words: tuple[str, ...], steps: int
) -> None:
    leaves_no_trace(pool, text, tmp_path, engine, sync, words, steps)


def leaves_no_trace(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str, sync: str, words: Sequence[str], steps: int
) -> None:
    chosen = [*words, f"train.steps={steps}", "optim.warmup_steps=2"]
    every = ["train.checkpoint_every_steps=1", "train.keep_checkpoints=100"]
    whole = run(pool, tmp_path / "whole", text, engine, sync, *chosen, *every)
    for step in range(1, steps):
        start = f"run.resume={tmp_path / 'whole' / 'checkpoints' / step_name(step)}"
        again = run(pool, tmp_path / f"from-{step}", text, engine, sync, *chosen, start)
        assert again.losses == {later: loss for later, loss in whole.losses.items() if later > step}, step
        assert again.digest == whole.digest, step


def fragments_under_way(folder: Path, steps: int) -> int:
    """In how many checkpoints something was under way."""
    found = 0
    for step in range(1, steps):
        (manifest,) = (folder / "checkpoints" / step_name(step)).glob("manifest.json")
        text = json.loads(manifest.read_text())
        found += any(
            value >= 0 for file in text["files"] for name, value in file["numbers"].items() if name.endswith(".flight")
        )
    return found


@pytest.mark.parametrize("method", ["streaming_diloco", "eager_diloco"])
def test_another_number_of_replicas_goes_on_with_what_was_under_way(
    pool: WorkerPool, text: Path, tmp_path: Path, method: str
) -> None:
    period = ["sync.every_steps=6", "train.steps=30", "optim.warmup_steps=2"]
    whole = run(pool, tmp_path / "whole", text, "fsdp", method, *period)
    run(pool, tmp_path / "half", text, "fsdp", method, *period, "train.stop_after_steps=13")
    losses = run(
        pool, tmp_path / "half", text, "fsdp", method, *period, "train.stop_after_steps=16", mesh=(4, 1)
    ).losses
    for step in range(14, 17):
        assert losses[step] == pytest.approx(whole.losses[step], rel=5e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharded_outer_state_is_the_replicated_one_to_the_bit(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str
) -> None:
    chosen = ["compress=none", "sync.every_steps=5", "train.steps=18"]
    whole = run(pool, tmp_path / "whole", text, engine, "diloco", *chosen)
    sharded = run(pool, tmp_path / "sharded", text, engine, "diloco", *chosen, "sync.outer_state=sharded",
                  "train.stop_after_steps=12")  # fmt: skip
    assert sharded.outcomes[0].reason == "stopped"
    sharded = run(pool, tmp_path / "sharded", text, engine, "diloco", *chosen, "sync.outer_state=sharded")
    assert sharded.losses == whole.losses
    assert sharded.digest == whole.digest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_merge_survives_the_next_inner_step(pool: WorkerPool, engine: str, precision: str) -> None:
    """Engines keep master copies: a merge into what forward sees alone would be gone after the next step."""
    assert pool.run(merged_then_stepped, engine, precision) == [True] * 4


def merged_then_stepped(engine_name: str, precision: str) -> bool:
    """With learning rate 0 a step changes nothing, so the merged values must still be there after it."""
    config = compose(["sync=streaming_diloco", f"engine={engine_name}", *SMALL])
    mesh = build_mesh(2, 2)
    torch.manual_seed(0)
    options = EngineOptions(
        precision=precision,
        activation_checkpointing=False, bucket_mib=1, clip_norm=0.0, microbatches=1, microbatch_size=4,
    )  # fmt: skip
    engine = build_engine(
        engine_name, Small(), lambda model: torch.optim.SGD(model.parameters(), lr=0.5), mesh, options
    )
    config.sync.update({"every_steps": 4, "overlap_steps": 1, "compress": None})
    sync: Sync = instantiate(config.sync, "sync")  # type: ignore[assignment]
    attached = sync.bind(engine.pieces, 0)
    assert isinstance(attached.method, LocalUpdateLoop)
    fqns = attached.method.cadence.fragments[0].fqns

    # DeepSpeed's bf16 casts the model, not its inputs.
    dtype = torch.bfloat16 if precision == "bf16" and engine_name.startswith("zero") else torch.float32

    def step() -> None:
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(mesh.rank)).to(dtype)
        engine.forward_backward([{"x": x}])
        attached.finish()
        attached.step()

    for _ in range(5):  # the first fragment is captured after step 4, and merged after step 5
        step()
    merged = engine.pieces.read(fqns)
    anchor = {fqn: attached.state.tensors[fqn]["anchor"] for fqn in merged}
    same = all(torch.equal(value, anchor[fqn]) for fqn, value in merged.items())
    engine.set_learning_rate(0.0)
    step()
    after = engine.pieces.read(fqns)
    kept = all(torch.equal(value, after[fqn]) for fqn, value in merged.items())
    attached.detach()
    mesh.control.close()
    engine.close()
    return same and kept
