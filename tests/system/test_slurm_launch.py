"""Jobs over four hosts with real Slurm: our trainer, programs that know nothing of it, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.slurm.devcluster import Cluster
from tests.system.conftest import TINY, digest, job_of, logs, rows, wait_for_end, wait_for_step

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(240)]

Command = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = Path(__file__).with_name("plain_ddp.py")
FOUR = ("launcher.nodes=4", "launcher.workers=4", "launcher.max_restarts=0", "launcher.wait=true")
MPI = Path(sys.prefix) / "mpi"


def test_training_across_four_hosts_ends_with_the_summary(dtrain: Command, tmp_path: Path) -> None:
    done = dtrain(
        "train", *TINY, "launcher.nodes=4", "launcher.workers=4", "launcher.wait=true", "mesh.replicate=4",
        "train.steps=20", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + logs(tmp_path / "run")
    assert "4 replicas x 1 shard (fsdp)" in done.stdout and "sent per rank" in done.stdout
    hosts = [json.loads((tmp_path / "run" / "ranks" / f"rank-{rank}.json").read_text())["host"] for rank in range(4)]
    assert hosts == ["c1", "c2", "c3", "c4"]


def test_a_shard_axis_on_the_slow_links_draws_a_warning(dtrain: Command, tmp_path: Path) -> None:
    done = dtrain("train", *TINY, "--dry-run", "mesh.replicate=1", "mesh.shard=2", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0 and "#SBATCH --nodes=2" in done.stdout
    assert "spans several nodes" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["srun", "torchrun", "openmpi", "mpich"])
def test_a_script_that_is_not_ours_runs_on_four_hosts(how: str, dtrain: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if how in ("srun", "torchrun"):
        launcher = ["launcher=slurm", f"launcher.per_node={how}"]
    else:
        launcher = ["launcher=mpi", f"launcher.mpirun={MPI / how / 'bin' / 'mpirun'}"]
    done = dtrain("launch", *launcher, *FOUR, f"run.dir={run}", "--", "python", str(SCRIPT))
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    for rank in range(4):
        said = (run / "logs" / f"rank-{rank}.log").read_text().splitlines()[-1]
        assert said.startswith(f"rank {rank} of 4 on c") and said.endswith("sum 6")
    assert len({(run / "logs" / f"rank-{rank}.log").read_text().splitlines()[-1][13:17] for rank in range(4)}) == 4


def test_pain_13_the_rank_that_raised_is_named_first_with_host_error_and_line(dtrain: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = dtrain("launch", "launcher=slurm", *FOUR, f"run.dir={run}", "--", "python", str(SCRIPT), "raise")
    assert done.returncode == 1
    why = dtrain("jobs", "why", job_of(run)).stdout.splitlines()
    assert why[0] == "rank 2 on c3 failed: KeyError: 'no example 7'"
    assert f"{SCRIPT}:16 in load_batch (exit code 1)" in why[1]
    assert "failed in consequence" in "".join(why)
    assert processes_of(run) == []


def test_a_rank_that_never_enters_a_collective_is_named_with_its_stack(dtrain: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = dtrain(
        "launch", "launcher=slurm", *FOUR, "launcher.hang_seconds=6", f"run.dir={run}", "--", "python", str(SCRIPT),
        "hang",
    )  # fmt: skip
    assert done.returncode == 1
    why = dtrain("jobs", "why", job_of(run)).stdout
    assert why.startswith("rank 2 on c3 has not entered all_reduce #"), why + logs(run)
    # Three wait; one whose connection was closed by the first that gave up does not any more.
    assert re.search("in which ([23] other ranks|1 other rank) .*waits?", why), why
    assert "time.sleep(600)" in why and "load_batch" in why
    assert processes_of(run) == []


def test_a_cut_link_during_diloco_is_as_if_nothing_had_happened(
    cluster: Cluster, dtrain: Command, tmp_path: Path
) -> None:
    settings = (*TINY, "sync=diloco", "train.steps=400", "launcher.wait=false")
    for name in ("undisturbed", "cut"):
        assert dtrain("train", *settings, f"run.dir={tmp_path / name}").returncode == 0
    wait_for_step(tmp_path / "cut", 40)
    host = json.loads((tmp_path / "cut" / "ranks" / "rank-1.json").read_text())["host"]
    cluster.cut(host)
    time.sleep(20)
    assert not (tmp_path / "cut" / "end.json").exists()
    cluster.heal(host)
    for name in ("undisturbed", "cut"):
        assert wait_for_end(tmp_path / name)["code"] == 0, logs(tmp_path / name)
    assert digest(tmp_path / "cut") == digest(tmp_path / "undisturbed")
    assert len((tmp_path / "cut" / "attempts").read_text().splitlines()) == 1


def test_a_replica_that_dies_does_not_take_the_others_with_it(dtrain: Command, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0': sys.exit(1)\n"
        "time.sleep(4)\n"
        "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], 'has ended', flush=True)\n"
    )
    run = tmp_path / "run"
    done = dtrain(
        "launch", "launcher=slurm", *FOUR, "launcher.isolate=replica", f"run.dir={run}", "--", "python", "alone.py"
    )
    assert done.returncode == 1 and "rank 0 on c1 failed: exit code 1" in done.stderr
    for rank in (1, 2, 3):
        assert f"rank {rank} of 4 has ended" in (run / "logs" / f"rank-{rank}.log").read_text()


def test_training_in_a_job_step_per_replica_goes_on_together_after_a_rank_was_killed(
    dtrain: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ("launcher.nodes=4", "launcher.workers=4", "mesh.replicate=2", "mesh.shard=2", "train.steps=150")
    every = ("train.checkpoint_every_steps=20", "launcher.wait=false", f"run.dir={run}")
    assert dtrain("train", *TINY, *settings, *every, "launcher.isolate=replica").returncode == 0
    assert (run / "job.sbatch").read_text().count("srun --kill-on-bad-exit=1") == 2
    wait_for_step(run, 40)
    os.kill(json.loads((run / "ranks" / "rank-0.beat").read_text())["pid"], signal.SIGKILL)
    assert wait_for_end(run)["code"] == 0, logs(run)
    assert len((run / "attempts").read_text().splitlines()) == 2
    assert max(row["step"] for row in rows(run)) == 150


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.partition=gpu"], "there is no partition gpu (there are main, debug); set launcher.partition"),
        (["launcher.nodes=5", "launcher.workers=5"], "partition main has 4 nodes, so the job would wait for ever"),
        (["launcher.partition=debug", "launcher.minutes=60"], "more than partition debug allows, which is 30"),
        (["launcher.nodes=2", "launcher.workers=3"], "cannot be spread evenly over launcher.nodes=2"),
        (['launcher.sbatch=["time=5"]'], "set launcher.minutes instead"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_slurm_would_refuse_or_never_start_is_refused_before(
    words: list[str], message: str, dtrain: Command, cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = dtrain("launch", "launcher=slurm", *words, f"run.dir={run}", "--", "python", str(SCRIPT))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not run.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.address=nowhere.invalid"], "nowhere.invalid, where the ranks are to meet, does not resolve on c"),
        (["launcher.port=6818"], "launcher.port=6818 is taken on c"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pains_1_and_3_what_only_the_nodes_can_know_is_told_by_name_and_at_once(
    words: list[str], message: str, dtrain: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = dtrain("launch", "launcher=slurm", *FOUR, *words, f"run.dir={run}", "--", "python", str(SCRIPT), seconds=40)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def processes_of(run: Path) -> list[str]:
    """What is left of a job on any host: they all are on this machine."""
    deadline = time.monotonic() + 15
    while True:
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        left = [line for line in listed.splitlines() if str(run) in line and "pytest" not in line.split("run.dir")[0]]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)
