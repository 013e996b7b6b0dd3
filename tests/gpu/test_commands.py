"""`dtrain train` and `dtrain bench` on the card, by their commands, one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.card import DEVICE

pytestmark = pytest.mark.usefixtures("training")
ROOT = Path(__file__).resolve().parents[2]


def dtrain(*words: str, folder: Path) -> str:
    """What the command prints. Fails with it, if the command does."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", *words], cwd=folder, env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_train(engine: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "words.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    run = tmp_path / "run"
    dtrain(
        "train", f"engine={engine}", "sync=diloco", "sync.every_steps=5", "compress=int8_ef", "mesh.replicate=1",
        "mesh.shard=1", "launcher.workers=1", "train.steps=20", f"data.path={text}", f"run.dir={run}", folder=tmp_path,
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [row["loss"] for row in rows if "loss" in row]
    assert summary["parameters_digest"] and seen[-1] < seen[0]


@pytest.mark.parametrize(("what", "ops"), [("collectives", "all"), ("hooks", "torch.all_reduce,int8_ef,topk_ef")])
def test_bench(what: str, ops: str, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    dtrain(
        "bench", what, "launcher.workers=1", f"bench.ops={ops}", "bench.min_bytes=64K", "bench.max_bytes=1M",
        "bench.iterations=5", "bench.warmup=4", f"run.dir={out}", folder=tmp_path,
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert rows and all(row["wrong"] == 0 for row in rows)
    if DEVICE == "cuda":
        assert {row["backend"] for row in rows} == {"nccl"}
