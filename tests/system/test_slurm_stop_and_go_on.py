"""Whatever stops a run under Slurm, it goes on by itself and ends with the same parameters, bit for bit.

The runs are stopped one after the other, and wait together for Slurm to start them again. What stops them is what users
report: see the pains in the names of the tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.slurm.devcluster import Cluster
from tests.system.conftest import TINY, attempts, digest, job_of, logs, wait_for_end, wait_for_step

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(300)]

STEPS, STOP = 160, 25
RUN = (*TINY, "sync=every_step", "compress=int8_ef", f"train.steps={STEPS}", "train.checkpoint_every_steps=15")


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every way to be stopped -> the folder of a run that was; "undisturbed" is the one to compare with."""
    folder = tmp_path_factory.mktemp("stops")
    ways: dict[str, Callable[[Path], object]] = {
        "undisturbed": lambda run: None,
        "term": lambda run: cluster.run(["scancel", "--signal=TERM", job_of(run)]),
        "requeue": lambda run: cluster.run(["scontrol", "requeue", job_of(run)]),
        "kill": kill_rank,
        "cancel": lambda run: cluster.run(["scancel", job_of(run)]),
    }
    for way, stop in ways.items():
        submit(cluster, folder / way)
        if way != "undisturbed":
            wait_for_step(folder / way, STOP)
            stop(folder / way)
    for way in ways:
        wait_for_end(folder / way)
    return {way: folder / way for way in ways}


def submit(cluster: Cluster, folder: Path, *more: str) -> None:
    done = cluster.run([sys.executable, "-m", "dtrain", "train", *RUN, f"run.dir={folder}", *more], check=False)
    assert done.returncode == 0, done.stderr


def kill_rank(folder: Path) -> None:
    """SIGKILL of the process that trains rank 1."""
    config = str(folder / "config.yaml")
    found = [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and _is_rank(Path("/proc") / entry, config, rank="1")
    ]
    assert len(found) == 1, f"{found} train rank 1 of {folder}"
    os.kill(found[0], signal.SIGKILL)


def _is_rank(process: Path, config: str, rank: str) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
        variables = (process / "environ").read_bytes().decode().split("\0")
    except OSError:
        return False
    # The wrapper of the rank names the configuration too, but has no RANK of its own.
    return config in words and "dtrain.launchers.rank" not in words and f"RANK={rank}" in variables


@pytest.mark.parametrize("way", ["term", "requeue", "kill"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_parameters(way: str, runs: dict[str, Path]) -> None:
    assert digest(runs[way]) == digest(runs["undisturbed"]), logs(runs[way])
    assert attempts(runs[way]) == 2


@pytest.mark.parametrize("way", ["term", "requeue", "kill"])
def test_pain_19_a_requeue_keeps_the_logs_of_what_came_before(way: str, runs: dict[str, Path]) -> None:
    for log in (runs[way] / "logs").glob("rank-*.log"):
        assert log.read_text().count("---- rank ") == 2


def test_pain_15_the_ranks_are_told_and_the_script_requeues_by_their_exit_code(runs: dict[str, Path]) -> None:
    said = (runs["term"] / "logs" / "batch.log").read_text()
    assert "asked to stop (signal)" in said
    assert "SIGTERM: stopping at the next agreed step" in (runs["term"] / "logs" / "rank-1.log").read_text()


def test_pain_21_the_checkpoint_to_go_on_from_is_found_when_the_job_starts_again(runs: dict[str, Path]) -> None:
    assert "resumed from " in (runs["requeue"] / "logs" / "rank-0.log").read_text()


def test_a_users_scancel_checkpoints_and_never_requeues(runs: dict[str, Path], cluster: Cluster) -> None:
    end = wait_for_end(runs["cancel"])
    assert (end["code"], end["reason"]) == (75, "cancelled"), logs(runs["cancel"])
    assert attempts(runs["cancel"]) == 1 and list((runs["cancel"] / "checkpoints").glob("step-*"))
    time.sleep(12)  # a requeued job would be back by now
    assert job_of(runs["cancel"]) not in cluster.run(["squeue", "--noheader", "--format=%i"]).stdout.split()


def test_no_process_of_a_job_is_left_on_any_host(runs: dict[str, Path]) -> None:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    left = [line for line in listed.splitlines() for run in runs.values() if f"{run}/config.yaml" in line]
    assert left == []


def test_a_time_limit_without_a_signal_is_kept_by_the_runs_own_clock(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "limit"
    # The steps come to an end only in a second run of the job: one minute is not enough for all of them.
    slow = ("model.layers=6", "model.dim=256", "train.steps=4000", "train.checkpoint_every_steps=0")
    submit(cluster, run, *slow, "launcher.minutes=1", "launcher.signal_seconds=0")
    try:
        deadline = time.monotonic() + 150
        while not (run / "attempts").exists() or attempts(run) < 2:
            assert time.monotonic() < deadline, logs(run)
            assert not (run / "end.json").exists(), logs(run)
            time.sleep(0.5)
        assert '"signal": 24' in (run / "outcome.json").read_text()  # SIGXCPU: the time limit
        while "resumed from " not in (run / "logs" / "rank-0.log").read_text():
            assert time.monotonic() < deadline, logs(run)
            time.sleep(0.2)
    finally:
        cluster.run(["scancel", job_of(run)])
