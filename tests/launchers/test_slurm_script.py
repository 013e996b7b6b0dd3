"""The sbatch text: golden files of what users ask for, and that bash can read them all.

DTRAIN_REWRITE_GOLDEN=1 writes the files anew; the difference is what a reviewer reads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from dtrain.launchers.records import RankRecord, first_cause, keep_attempt
from dtrain.launchers.slurm.group import Group
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.launchers.slurm.script import Work, render
from tests.launchers.test_why import ended

GOLDEN = Path(__file__).with_name("golden")
PROGRAM = ("python", "-u", "train.py", "--name", "two words", "{folder}/config.yaml")
ONE = (Path("/shared/runs/x"),)


def work(*folders: Path, environment: dict[str, str] | None = None, replicas: int = 1) -> Work:
    here, lists = Path("/home/me/my project"), Path("/shared/runs/x-array/folders.txt")
    return Work("x", PROGRAM, folders or ONE, here, lists, environment or {}, replicas=replicas)


PYTHON = "/venv/bin/python"
CASES: dict[str, tuple[Work, SlurmLauncher]] = {
    "plain": (work(), SlurmLauncher(python=PYTHON)),
    "four_nodes": (
        work(environment={"NCCL_DEBUG": "WARN", "TEXT": "it's"}),
        SlurmLauncher(
            python=PYTHON, nodes=4, workers=16, gpus_per_node=4, threads_per_worker=8, memory_gib=256, minutes=1440,
            partition="gpu", account="me", qos="normal", constraint="a100", exclude="n[3-4]", reservation="week",
            interface="ib0", setup=("module load cuda", "source env.sh"), sbatch=("exclusive", "mail-type=END"),
        ),
    ),
    "torchrun": (work(), SlurmLauncher(python=PYTHON, nodes=2, workers=8, per_node="torchrun", threads_per_worker=4)),
    "array": (
        work(Path("/shared/runs/a"), Path("/shared/runs/b"), Path("/shared/runs/c")),
        SlurmLauncher(python=PYTHON, nodes=1, workers=2, array_parallel=2),
    ),
    "replicas": (work(replicas=2), SlurmLauncher(python=PYTHON, nodes=4, workers=8, isolate="replica")),
    "replicas_on_two_nodes": (work(replicas=4), SlurmLauncher(python=PYTHON, nodes=2, workers=8, isolate="replica")),
    "replicas_on_one_node": (work(replicas=2), SlurmLauncher(python=PYTHON, nodes=1, workers=4, isolate="replica")),
    "heterogeneous": (
        work(),
        SlurmLauncher(
            python=PYTHON, nodes=3, workers=12,
            groups=("nodes=2 workers=8 constraint=a100", "nodes=1 workers=4 partition=h100"),
        ),
    ),
    "pyxis": (
        work(),
        SlurmLauncher(
            python="python3", nodes=2, workers=2, container="nvcr.io#nvidia/pytorch",
            container_args=("--no-container-mount-home",),
        ),
    ),
    "apptainer": (
        work(),
        SlurmLauncher(
            python="python3", container="torch.sif", container_runtime="apptainer", container_args=("--rocm",)
        ),
    ),
    "fixed_meeting_point": (
        work(),
        SlurmLauncher(python=PYTHON, nodes=2, workers=2, address="10.1.2.3", port=29500, signal_seconds=0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one(name: str) -> None:
    text = render(*CASES[name])
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("DTRAIN_REWRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", CASES)
def test_bash_can_read_the_script(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=render(*CASES[name]), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_srun_is_told_the_cpus_of_a_task_which_it_does_not_inherit() -> None:
    assert "export SRUN_CPUS_PER_TASK=16\n" in render(*CASES["torchrun"])
    assert "export SRUN_CPUS_PER_TASK=8\n" in render(*CASES["four_nodes"])


def test_the_script_is_a_pure_function() -> None:
    assert render(*CASES["four_nodes"]) == render(*CASES["four_nodes"])


@pytest.mark.parametrize(
    ("settings", "replicas", "words"),
    [
        (SlurmLauncher(nodes=2, workers=3), 1, "choose 2 or 4 workers"),
        (SlurmLauncher(minutes=0, signal_seconds=0), 1, "at least 1 minute"),
        (SlurmLauncher(minutes=2, signal_seconds=120), 1, "leaves nothing of a time limit of 2 minutes"),
        (SlurmLauncher(workers=4, isolate="replica"), 3, "cannot form 3 job steps"),
        (SlurmLauncher(workers=4, isolate="replica", per_node="torchrun"), 2, "needs launcher.per_node=srun"),
        (SlurmLauncher(nodes=3, workers=6, isolate="replica"), 2, "2 replicas on launcher.nodes=3 would share nodes"),
        (SlurmLauncher(nodes=2, workers=8, isolate="replica", gpus_per_node=4), 4, "2 replicas on each node would"),
        (SlurmLauncher(port=70000), 1, "is no port"),
        (SlurmLauncher(minutes=999_999_999), 1, "is more than Slurm can count, which is 35791394"),
        (SlurmLauncher(sbatch=("--time=5",)), 1, "set launcher.minutes instead"),
        (SlurmLauncher(sbatch=("open-mode=truncate",)), 1, "it must be append"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_way_out(settings: SlurmLauncher, replicas: int, words: str) -> None:
    (problem,) = settings.problems(replicas)
    assert words in problem


@pytest.mark.parametrize(
    "text", ["", "nodes=2", "nodes=two workers=2", "nodes=1 workers=1 colour=red", "nodes=1 workers"]
)
def test_a_group_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        Group.parse(text)


def test_the_records_of_an_attempt_are_kept_and_its_first_cause_is_named(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    closed = ended(0, message='RuntimeError: Connection closed by "peer"', ended=10.25)
    cut = ended(2, exit_code=None, signal="SIGKILL", message="killed", ended=10.5)
    late = ended(3, exit_code=None, signal="SIGTERM", ended=9.0)
    for record in (closed, cut, late):
        (tmp_path / "ranks" / f"rank-{record.rank}.json").write_text(json.dumps(dataclasses.asdict(record)) + "\n")
        (tmp_path / "ranks" / f"rank-{record.rank}.beat").touch()
    assert first_cause(tmp_path) == "rank 2 on n2 first: SIGKILL, exit code 137"
    keep_attempt(tmp_path)
    assert [path.name for path in (tmp_path / "ranks").iterdir()] == ["attempt-1.jsonl"]
    assert RankRecord.earlier(tmp_path) == {1: [closed, cut, late]}
