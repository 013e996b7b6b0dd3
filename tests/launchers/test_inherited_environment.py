"""What a job gets of the environment that it is launched from, which may be that of another job's rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from dtrain.cli.login_host import enter_launcher
from dtrain.launchers.background import LocalLauncher
from dtrain.launchers.inherited_environment import Kept, defaults_of_shell, handed_on, unused
from dtrain.launchers.registry import made
from dtrain.launchers.slurm.launcher import SlurmLauncher

PLACES = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "TORCHELASTIC_RUN_ID": "x",
    "OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_ess": "pmix", "PMI_RANK": "0", "PMIX_RANK": "0", "MPI_LOCALRANKID": "0",
    "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1", "SLURM_CPU_BIND": "mask_cpu:0x4",
    "SLURM_DISTRIBUTION": "cyclic", "DTRAIN_ATTEMPT": "2", "DTRAIN_LOCKED": "/another", "DTRAIN_RANK_OFFSET": "4",
}  # fmt: skip
"""What no job inherits."""
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_MEM_PER_CPU": "100"}
ASKING = {
    "SBATCH_TIMELIMIT": "7", "SBATCH_NO_REQUEUE": "1", "SBATCH_PARTITION": "debug", "SRUN_CPUS_PER_TASK": "1",
    "SALLOC_ACCOUNT": "me", "SQUEUE_STATES": "PD", "SLURM_EXCLUSIVE": "1", "SLURM_GPUS_PER_NODE": "4",
    "CUDA_VISIBLE_DEVICES": "3",
}  # fmt: skip
KEPT = {
    "SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "big", "SLURM_JWT": "token", "PATH": "/bin",
    "HYDRA_FULL_ERROR": "1", "NCCL_DEBUG": "INFO", "DTRAIN_CLUSTER": "dev", "MPICH_GPU_SUPPORT_ENABLED": "1",
}  # fmt: skip


@pytest.mark.parametrize("kind", get_args(Kept))
def test_no_rank_takes_the_place_of_one_of_another_job(kind: Kept) -> None:
    left = handed_on({**PLACES, **ALLOCATION, **ASKING, **KEPT}, kind)
    assert not PLACES.keys() & left.keys() and KEPT.items() <= left.items()


def test_each_launcher_keeps_what_it_needs_of_the_job_around_it() -> None:
    everything = {**PLACES, **ALLOCATION, **ASKING, **KEPT}
    assert handed_on(everything, "cluster") == KEPT
    assert handed_on(everything, "job") == {**KEPT, "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "3"}
    mpirun = handed_on(everything, "allocation")
    assert ALLOCATION.items() <= mpirun.items()
    assert mpirun["SLURM_OVERLAP"] == "1"  # its daemons must not wait for the cores of this very step
    assert "SLURM_OVERLAP" not in handed_on(KEPT, "allocation")


def test_settings_of_users_stay() -> None:
    tuned = {"OMPI_MCA_btl": "tcp,self", "PMIX_MCA_gds": "hash", "TORCH_NCCL_TRACE_BUFFER_SIZE": "1"}
    assert handed_on(tuned, "cluster") == tuned
    assert handed_on({"CUDA_VISIBLE_DEVICES": "1"}, "cluster") == {"CUDA_VISIBLE_DEVICES": "1"}  # of no job


def test_defaults_of_sbatch_serve_where_nothing_is_given_and_the_others_are_told() -> None:
    shell = {"SBATCH_PARTITION": "debug", "SBATCH_ACCOUNT": "me", "SBATCH_EXPORT": "NONE", "SBATCH_TIMELIMIT": "7"}
    assert defaults_of_shell(shell, []) == ({"account": "me", "partition": "debug"}, ["export=NONE"])
    assert defaults_of_shell(shell, ["partition", "export"]) == ({"account": "me"}, [])
    (said,) = unused(shell)
    assert said.startswith("SBATCH_TIMELIMIT=7 of this shell is not used") and "launcher." in said


@pytest.mark.parametrize("given", ["", "main"])
def test_sbatch_is_given_a_clean_environment_and_the_directives_that_were_asked_for(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs, run = tmp_path / "stubs", tmp_path / "run"
    stubs.mkdir()
    seen = tmp_path / "seen"
    for name, text in {
        "sinfo": 'echo "main*|2|infinite|up"; echo "debug|2|infinite|up"',
        "sbatch": f'[ "$1" = --version ] || env > {seen}; echo "Submitted batch job 7"',
        "scontrol": "exit 1",
    }.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}\n")
        (stubs / name).chmod(0o755)
    for name, value in {**PLACES, **ALLOCATION, **ASKING, **KEPT, "PATH": f"{stubs}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = dict(os.environ)
    launcher = SlurmLauncher(partition=given, minutes=90, signal_seconds=0, snapshot=False)
    assert launcher.submit(["true"], folder=run).id == "7"
    handed = dict(line.partition("=")[::2] for line in seen.read_text().splitlines())
    assert not {*PLACES, *ALLOCATION, *ASKING} & handed.keys()
    assert handed["SLURM_CONF"] == KEPT["SLURM_CONF"] and handed["NCCL_DEBUG"] == "INFO"
    text = (run / "job.sbatch").read_text()
    assert f"#SBATCH --partition={given or 'debug'}\n" in text and "#SBATCH --time=90\n" in text
    assert dict(os.environ) == before


@pytest.mark.processes
def test_ranks_of_this_machine_are_none_of_the_job_around_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**PLACES, **ALLOCATION, "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    program = ["python", "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    launcher = LocalLauncher(environment=("SLURM_MINE=given", "COLOUR=blue"))
    job = launcher.submit(program, folder=tmp_path / "run")
    assert job.wait(50) == "finished", job.why()
    seen = json.loads((tmp_path / "run" / "logs" / "rank-0.log").read_text().splitlines()[-1])
    assert {name for name in seen if name.startswith(("SLURM_", "OMPI_", "PMI"))} == {
        "SLURM_JOB_ID", "SLURM_CONF", "SLURM_MINE"
    }  # fmt: skip
    assert (seen["COLOUR"], seen["DTRAIN_LOCKED"]) == ("blue", str(tmp_path / "run"))
    assert (seen["RANK"], seen["MASTER_ADDR"], seen["TORCHELASTIC_RUN_ID"] == "x") == ("0", "127.0.0.1", False)
    assert "DTRAIN_ATTEMPT" not in seen


@pytest.mark.parametrize("kind", ["local", "slurm", "mpi"])
def test_the_launching_process_is_no_rank_of_the_job_around_it_either(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**PLACES, **ALLOCATION}.items():
        monkeypatch.setenv(name, value)
    enter_launcher(made({"name": kind}), [])  # it builds the user's model after that
    assert not PLACES.keys() & os.environ.keys()
