"""Run folders as a run leaves them, without training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from dtrain.report.summary import Summary
from dtrain.train.config import compose, to_yaml

SUMMARY = Summary(
    run="runs/x", replicas=2, shards=1, engine="ddp", steps=40, seconds=20.0, skipped_steps=0, loss=2.0,
    validation_loss=2.1, evaluated="parameters", tokens_per_second=1000.0, sent_bytes_per_rank=4_000_000,
    dense_bytes_per_rank=16_000_000, compute_utilization=0.9, exposed_fraction=0.1, parameters_digest="abc",
)  # fmt: skip


def write_run(
    folder: Path, words: Sequence[str] = (), *, steps: int = 40, bytes_per_step: int = 100_000, split: bool = True
) -> Path:
    """A run of so many steps with a row every second one, evaluated every tenth. ``split``: as newer runs have it."""
    folder.mkdir(parents=True)
    config = compose([*words, f"run.dir={folder}"])
    (folder / "config.yaml").write_text(to_yaml(config))
    rows: list[dict[str, object]] = []
    for step in range(2, steps + 1, 2):
        parts = {"computing": 0.4, "encode": 0.01, "exchange": 0.1, "decode": 0.02} if split else {}
        rows.append({
            "step": step, "loss": 1 + 4 / step, "tokens": 512 * step, "seconds": 0.5 * step,
            "sent_bytes": bytes_per_step * step, "exposed_seconds": 0.05 * step,
            **{f"{name}_seconds": share * step for name, share in parts.items()},
        })  # fmt: skip
        if step % 10 == 0:
            rows.append({"step": step, "validation_loss": 1.1 + 4 / step})
    rows.append({"step": steps, "decision": "replica 1 was repaired <b>"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.json").write_text(json.dumps({"sha256": "one"}))
    dataclasses.replace(SUMMARY, steps=steps).write(folder / "summary.json")
    (folder / "traffic").mkdir()
    for rank in range(2):
        record = {
            "rank": rank, "host": f"c{rank + 1}", "waited": {"gradients": 1.5},
            "sent": {"gradients": {"AllToAll": [3_000_000, 40]}, "control": {"AllGather": [960, 40]}},
        }  # fmt: skip
        (folder / "traffic" / f"rank-{rank}.json").write_text(json.dumps(record))
    return folder
