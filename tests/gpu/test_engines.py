"""The five engines, two replicas on the one card: each method trains, all replicas agree, a stop leaves no trace."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from dtrain.testing import WorkerPool
from tests.gpu.card import DEVICE
from tests.gpu.jobs import on_card, trained

pytestmark = pytest.mark.usefixtures("training")

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
METHODS = {
    "dense": ("sync=every_step", "sync.verify_every=4"),
    "int8": ("sync=every_step", "compress=int8_ef", "sync.verify_every=4"),
    "diloco": ("sync=diloco", "sync.every_steps=4", "sync.verify_every=1"),
    "streaming": ("sync=streaming_diloco", "sync.every_steps=4", "sync.overlap_steps=1", "sync.verify_every=1"),
}
SMALL = (
    "model.dim=32", "model.layers=2", "model.heads=2", "data.block=32", "train.batch_size=8", "train.steps=16",
    "train.log_every_steps=1", "train.evaluation_examples=8", "train.evaluate_every_steps=0", "optim.warmup_steps=2",
    "train.checkpoint_every_steps=0", "optim.inner.lr=0.003", "engine.bucket_mib=0.08",
)  # fmt: skip


def words(engine: str, method: str, text: Path, mesh: tuple[int, int] = (2, 1)) -> list[str]:
    replicas, shards = mesh
    group = (f"mesh.replicate={replicas}", f"mesh.shard={shards}", f"launcher.workers={replicas * shards}")
    return [f"engine={engine}", *METHODS[method], f"data.path={text}", *group, *SMALL]


def need(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed here: pip install 'dtrain[zero]'")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{number} pack my box with five dozen liquor jugs, they said.\n" * 60)
    return folder


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def digest(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["parameters_digest"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_it_trains(engine: str, method: str, workers: WorkerPool, backend: str, text: Path, tmp_path: Path) -> None:
    need(engine)
    folder = tmp_path / "run"
    workers.run(on_card, backend, trained, words(engine, method, text), str(folder), seconds=240)
    seen = losses(folder)
    assert len(seen) == 16 and seen[16] < 0.9 * seen[1]


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_two_shards_of_nccl_on_one_card(
    engine: str, workers: WorkerPool, backend: str, text: Path, tmp_path: Path
) -> None:
    """One replica of two shards: the engine's own collectives are on the card."""
    need(engine)
    if backend != "nccl" and DEVICE == "cuda":
        pytest.skip("engines shard over NCCL, of which several ranks on one card do not work here")
    folder = tmp_path / "run"
    workers.run(on_card, backend, trained, words(engine, "diloco", text, (1, 2)), str(folder), seconds=240)
    seen = losses(folder)
    assert seen[16] < 0.9 * seen[1]


def test_dense_is_the_same_on_all_engines(workers: WorkerPool, backend: str, text: Path, tmp_path: Path) -> None:
    by_engine = {}
    for engine in ENGINES:
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            continue
        folder = tmp_path / engine
        workers.run(on_card, backend, trained, words(engine, "dense", text), str(folder), seconds=240)
        by_engine[engine] = losses(folder)
    for engine, seen in by_engine.items():
        assert seen == pytest.approx(by_engine["ddp"], rel=1e-4), engine


@pytest.mark.parametrize(("engine", "method"), [("ddp", "int8"), ("fsdp", "streaming")])
def test_a_run_that_was_stopped_resumes_bit_identically(
    engine: str, method: str, workers: WorkerPool, backend: str, text: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    chosen = words(engine, method, text)
    workers.run(on_card, backend, trained, chosen, str(whole), seconds=240)
    workers.run(on_card, backend, trained, [*chosen, "train.stop_after_steps=7"], str(stopped), seconds=240)
    resumed = tmp_path / "resumed"
    shutil.copytree(stopped, resumed)
    workers.run(on_card, backend, trained, chosen, str(resumed), seconds=240)
    assert losses(resumed) == losses(whole) and digest(resumed) == digest(whole)


@pytest.mark.parametrize("method", ["dense", "int8", "streaming"])
def test_the_transport_changes_no_bit(
    method: str, workers: WorkerPool, backend: str, text: Path, tmp_path: Path
) -> None:
    """Means are added up in rank order by dtrain, so NCCL's results are gloo's."""
    if backend != "nccl":
        pytest.skip("several ranks of NCCL on one card do not work here: there is gloo alone")
    found = []
    for name in ("nccl", "gloo"):
        folder = tmp_path / name
        workers.run(on_card, name, trained, words("ddp", method, text), str(folder), seconds=240)
        found.append((losses(folder), digest(folder)))
    assert found[0] == found[1]
