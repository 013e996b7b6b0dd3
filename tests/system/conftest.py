"""A Slurm cluster of four hosts for the tests of this folder, and the command line as a user has it there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.slurm.devcluster import Cluster, devcluster

NAME = f"tests{os.environ.get('PYTEST_XDIST_WORKER', '')[-1:]}"  # two sets of files run at a time
TINY = (
    "mesh.replicate=2", "mesh.shard=1", "launcher=slurm", "launcher.nodes=2", "launcher.workers=2", "model.dim=64",
    "model.layers=2", "data.block=32", "train.batch_size=8", "train.evaluate_every_steps=0", "train.log_every_steps=5",
)  # fmt: skip
"""Overrides of a run that two hosts take through 100 steps in a few seconds."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four hosts, 1 gbit each. Without root or Slurm this fails, as it should: nothing here is skipped."""
    with devcluster(nodes=4, bandwidth="1gbit", name=NAME) as up:
        yield up


@pytest.fixture
def dtrain(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """dtrain("train", "engine=ddp", ...): the command, which finds the login host by itself."""
    monkeypatch.setenv("DTRAIN_CLUSTER", NAME)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*words: str, seconds: float = 170) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dtrain", *words], cwd=tmp_path, capture_output=True, text=True, timeout=seconds,
            stdin=subprocess.DEVNULL, check=False, env=dict(os.environ),
        )  # fmt: skip

    return run


def job_of(folder: Path) -> str:
    """The id of the job that was submitted into a folder."""
    found: str = json.loads((folder / "job.json").read_text())["id"]
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics so far."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(folder: Path, step: int, seconds: float = 90) -> None:
    """Return when the run has logged this step."""
    deadline = time.monotonic() + seconds
    while not any(row["step"] >= step for row in rows(folder)):
        assert time.monotonic() < deadline, f"{folder} never came to step {step}: {logs(folder)}"
        time.sleep(0.1)


def wait_for_end(folder: Path, seconds: float = 170) -> dict[str, Any]:
    """What the script wrote when the job ended, whose attempts are then over."""
    deadline = time.monotonic() + seconds
    while not (folder / "end.json").exists():
        assert time.monotonic() < deadline, f"{folder} has not ended: {logs(folder)}"
        time.sleep(0.2)
    found: dict[str, Any] = json.loads((folder / "end.json").read_text())
    return found


def logs(folder: Path) -> str:
    """The ends of all logs, for the message of a failed assertion."""
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted((folder / "logs").glob("*.log")))


def digest(folder: Path) -> str:
    """The digest of what a finished run exported."""
    found: str = json.loads((folder / "summary.json").read_text())["parameters_digest"]
    return found


def attempts(folder: Path) -> int:
    """How often the ranks were started."""
    return len((folder / "attempts").read_text().splitlines())
