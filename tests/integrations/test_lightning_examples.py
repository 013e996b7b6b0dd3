"""The examples of Lightning and Fabric run and learn; tests/test_examples.py counts their lines."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def torchrun(name: str, *arguments: str, workers: int = 2) -> str:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command = [*run, f"examples/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "shards"), [("lightning_trainer", 1), ("lightning_fsdp2", 2)])
def test_the_trainer_learns_logs_its_bytes_and_keeps_the_best(name: str, shards: int, tmp_path: Path) -> None:
    said = torchrun(name, str(tmp_path), workers=2 * shards)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    losses, values = ([float(row[name]) for row in rows if row[name]] for name in ("loss", "val_loss"))
    assert losses[-1] < 0.2 * losses[0] and values[-1] == min(values) and f"val_loss {values[-1]:.3f}" in said
    sent = [float(row["dtrain_sent_bytes"]) for row in rows if row["dtrain_sent_bytes"]]
    assert sent == sorted(sent) and sent[-1] > sent[0]
    assert {row["dtrain_skipped_steps"] for row in rows} == {"", "0.0"}
    (checkpoint,) = tmp_path.glob("*.ckpt")
    files = {path.name for path in Path(f"{checkpoint}.dtrain").iterdir()}
    places = [(replica, shard) for replica in range(2) for shard in range(shards)]
    assert files == {f"replica-{replica}-of-2.shard-{shard}-of-{shards}.safetensors" for replica, shard in places}


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_the_loop_learns() -> None:
    said = torchrun("fabric_loop")
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", said)]
    assert losses[-1] < 0.2 * losses[0] and "0 skipped, sent" in said
