"""The probe around a program that notes collectives of its own, as the MPI transport does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.launchers import probe

PROGRAM = """
import sys, time
from dtrain.launchers.probe import note_collective
note_collective("replicas", "AllReduce", 1, 10, "float32")()
over = note_collective("replicas", "AllGather", 2, 7, "int8")
if sys.argv[1] == "finishes":
    over()
time.sleep(float(sys.argv[2]))
"""


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The exit code of the program under the probe, its error record and its last heartbeat."""
    (folder / "program.py").write_text(PROGRAM)
    limits = {probe.FOLDER: str(folder), probe.HANG_SECONDS: "0.3", probe.BEAT_SECONDS: "0.05", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, str(Path(probe.__file__).resolve()), str(folder / "program.py"), *arguments],
        env={**os.environ, **limits}, capture_output=True, timeout=50, check=False,
    )  # fmt: skip
    error, beat = folder / "rank-0.error", folder / "rank-0.beat"
    return done.returncode, json.loads(error.read_text()) if error.exists() else {}, json.loads(beat.read_text())


@pytest.mark.processes
def test_a_collective_that_torch_does_not_know_of_ends_a_rank_that_hangs_in_it_and_is_named(tmp_path: Path) -> None:
    code, error, beat = run(tmp_path, "hangs", "40")
    assert (code, error["kind"]) == (1, "Hang")
    assert "s in AllGather #2 of group replicas (7 int8), longer than launcher.hang_seconds=0.3" in error["message"]
    assert beat["waiting"]["number"] == 2 and beat["entered"] == {"replicas": 2}


@pytest.mark.processes
def test_a_rank_that_waits_for_no_collective_is_left_alone(tmp_path: Path) -> None:
    code, error, beat = run(tmp_path, "finishes", "0.8")
    assert (code, error, beat["waiting"]) == (0, {}, None)
    assert beat["recent"] == ["AllReduce #1 of group replicas (10 float32)", "AllGather #2 of group replicas (7 int8)"]
