"""What the batch script decides, whatever Slurm answers and whenever it is signalled: run with stubs around it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.launchers.slurm.attempt import PATIENCE
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.launchers.slurm.script import Work, render
from tests.launchers.test_why import ended

pytestmark = pytest.mark.processes

RUNNING = "JobId=7 JobState=RUNNING Restarts=0 StartTime=2026-01-01T10:00:00 PreemptTime=None"
ENDING = "JobId=7 JobState=COMPLETING Restarts=0 StartTime=2026-01-01T10:00:00 PreemptTime=None"
PREEMPTED = "JobId=7 JobState=COMPLETING Restarts=0 StartTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T10:00:09"
SIGNAL_ALL = "kill -TERM 0; sleep 0.1"  # as Slurm does: the script, its subshells, and what they have started


def run(
    tmp_path: Path, *, ranks: int, says: str, first: str = ":", max_restarts: int = 0, python: str = sys.executable
) -> dict[str, object]:
    """How the job ended: what end.json says, and whether it was requeued.

    ``ranks``: the exit code that each rank leaves. ``says``: what Slurm tells of the job. ``first``: what happens while
    it is asked.
    """
    stubs, folder = tmp_path / "stubs", tmp_path / "run"
    stubs.mkdir()
    record = json.dumps(dataclasses.asdict(ended(0, exit_code=ranks, ended=10.0)))
    texts = {
        "scontrol": f'case "$2" in hostnames) echo localhost;; job) {first}; echo "{says}";; '
        f'*) [ "$1" = requeue ] && touch {tmp_path}/requeued; true;; esac',
        "squeue": 'case "$*" in *%L*) echo 30:00;; *) echo 7.batch;; esac',
        "srun": f"echo '{record}' > {folder}/ranks/rank-0.json; exit 0",
    }
    for name, text in texts.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    work = Work("x", ("true",), (folder,), tmp_path, tmp_path / "list")
    (tmp_path / "job.sh").write_text(render(work, SlurmLauncher(python=python, max_restarts=max_restarts)))
    environment = {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    environment[PATIENCE] = "1"
    done = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=40,
        start_new_session=True, check=False,
    )  # fmt: skip
    end = folder / "end.json"
    found = json.loads(end.read_text()) if end.exists() else {}
    return {**found, "requeued": (tmp_path / "requeued").exists(), "said": done.stdout + done.stderr}


@pytest.mark.parametrize("ranks", [1, 75])
def test_a_job_that_is_cancelled_while_slurm_is_asked_ends_as_cancelled(ranks: int, tmp_path: Path) -> None:
    end = run(tmp_path, ranks=ranks, says=ENDING, first=SIGNAL_ALL)
    assert (end.get("code"), end.get("reason"), end["requeued"]) == (ranks, "cancelled", False), end["said"]


@pytest.mark.parametrize(("ranks", "reason"), [(75, "Slurm does not say by whom"), (1, "attempts in a row")])
def test_no_answer_never_requeues(ranks: int, reason: str, tmp_path: Path) -> None:
    end = run(tmp_path, ranks=ranks, says="")
    assert reason in str(end.get("reason")) and not end["requeued"], end["said"]
    assert end["code"] == ranks


@pytest.mark.parametrize(
    ("says", "ranks", "requeued"),
    [
        (PREEMPTED, 75, True),  # PreemptMode=CANCEL: nobody else starts it again
        (PREEMPTED, 1, True),
        (PREEMPTED.replace("COMPLETING", "RUNNING"), 1, True),  # within its grace time
        (PREEMPTED.replace("T10:00:09", "T09:00:00"), 75, False),  # in an earlier run of the job: now it was the user
        (ENDING, 75, False),
        (RUNNING, 75, True),  # the ranks had a signal of their own
    ],
    ids=["preempted", "preempted, failed", "in grace", "preempted before", "cancelled", "signalled"],
)
def test_who_ended_the_ranks_decides_whether_the_job_goes_on(
    says: str, ranks: int, requeued: bool, tmp_path: Path
) -> None:
    end = run(tmp_path, ranks=ranks, says=says, max_restarts=1)
    assert end["requeued"] == requeued, end["said"]
    assert requeued or (end["code"], end["reason"]) == (ranks, "cancelled"), end["said"]


@pytest.mark.parametrize("ranks", [2, 126, 127])
def test_a_program_that_cannot_be_started_is_not_started_again(ranks: int, tmp_path: Path) -> None:
    end = run(tmp_path, ranks=ranks, says=RUNNING, max_restarts=3)
    assert (end["code"], end["requeued"]) == (2, False), end["said"]
    assert str(end["said"]).count("dtrain: attempt ") == 1


def test_without_the_interpreter_the_job_says_so(tmp_path: Path) -> None:
    end = run(tmp_path, ranks=0, says=RUNNING, python="/no/python")
    assert end["code"] == 2 and str(end["reason"]).startswith("/no/python cannot be started on "), end["said"]
