"""The probe around a program that notes collectives of its own, as the MPI transport does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dtrain.launchers import exit_codes, probe

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


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_is_set_while_a_rank_waits_ends_nothing(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    watch = probe.Probe(tmp_path, 0, hang_seconds=600.0)
    watch._main = threading.main_thread().ident
    monkeypatch.setattr(watch, "_give_up", lambda waiting, waited, stack: ended.append(str(waited)))
    wall, monotonic = time.time(), time.monotonic()
    over = probe.note_collective("replicas", "AllGather", 3, 7, "int8")
    since = []
    for wall_passed, passed in ((0.0, 0.0), (1.0, 1.0), (2.0 + jump, 2.0), (602.0 + jump, 602.0)):
        monkeypatch.setattr(time, "time", lambda wall_passed=wall_passed: wall + wall_passed)
        monkeypatch.setattr(time, "monotonic", lambda passed=passed: monotonic + passed)
        watch._beat()
        beat = json.loads((tmp_path / "rank-0.beat").read_text())
        since.append(round(beat["time"] - beat["since"], 3))
    over()
    assert since == [0.0, 1.0, 2.0, 602.0]
    assert ended == ["602.0"], "only the last of them has waited for longer than the limit"


def test_the_probe_which_imports_nothing_of_ours_means_the_same_by_exit_codes() -> None:
    codes = (probe.FAILED, probe.BAD_CONFIG, probe.ENDED_WELL)
    assert codes == (exit_codes.FAILED, exit_codes.BAD_CONFIG, exit_codes.ENDED_WELL)
