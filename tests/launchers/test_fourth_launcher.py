"""A launcher is added by one file (pbs.py beside this one) and one registration; no other place knows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.cli.main import main
from dtrain.launchers import registry
from dtrain.train.config import compose, load, to_yaml
from tests.launchers.pbs import PbsJob, PbsLauncher

TRAIN = [
    "launcher=pbs", "data=text", "data.path=text", "train.batch_size=4", "model.dim=32", "model.layers=1",
    "data.block=16", "train.evaluation_examples=0", "run.dir=run", "engine=ddp", "mesh.replicate=4", "mesh.shard=1",
]  # fmt: skip

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("dtrain.cli.jobs.enter_login_host", lambda arguments: None)  # whoever has a cluster up
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text("\n".join(f"{i} times {number}" for i in range(40)))
    registry.register("pbs", PbsLauncher)
    yield
    registry.unregister("pbs")
    PbsJob.cancelled.clear()


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run


def test_a_dry_run_prints_its_script_and_the_configuration(shell: Shell, tmp_path: Path) -> None:
    code, out, error = shell("train", "--dry-run", *TRAIN, "launcher.queue=long", "launcher.nodes=2")
    assert code == 0, error
    assert "#PBS -q long\n#PBS -l select=2:mpiprocs=2\n#PBS -l walltime=30:00\n" in out
    assert f"dtrain.launchers.rank {tmp_path}/run -- " in out and "dtrain.train.worker" in out
    assert "#   queue: long\n" in out and "partition" not in out
    assert not (tmp_path / "run").exists()


def test_its_jobs_are_started_watched_and_cancelled(shell: Shell, tmp_path: Path) -> None:
    code, out, error = shell("train", *TRAIN)
    assert code == 0 and f"job 4711 (pbs): run {tmp_path}/run\n  dtrain jobs status 4711" in out, error
    assert load(tmp_path / "run" / "config.yaml").launcher == PbsLauncher(workers=4, max_restarts=3)
    listed = shell("jobs", "list")[1].splitlines()[1].split()
    assert listed[:4] == ["4711", "pbs", "run", "pending"]
    assert "waits for: Queue" in shell("jobs", "status", "run")[1]
    code, _, error = shell("train", *TRAIN)
    assert code == 2 and "holds job 4711, which is pending" in error
    assert shell("jobs", "cancel", "4711")[0] == 0 and "4711 (pbs) run: cancelled" in shell("jobs", "status", "4711")[1]


def test_its_keys_are_checked_like_those_of_others(shell: Shell) -> None:
    for word, said in (
        ("launcher.walltime_minutes=0", "launcher.walltime_minutes must be at least 1, but is 0"),
        ("launcher.walltime_minutes=x", "launcher.walltime_minutes must be an integer, but is 'x'"),
        ("launcher.partition=gpu", "launcher.partition=gpu means nothing to launcher=pbs: leave it out"),
        ("launcher.nodes=3", "launcher.workers=4 cannot be spread evenly over launcher.nodes=3; choose 3 or 6 workers"),
        ("mesh.transport=mpi", "mesh.transport=mpi needs ranks that mpirun has started"),
    ):
        code, _, error = shell("train", "--dry-run", *TRAIN, word)
        assert code == 2 and said in error
    code, _, error = shell("train", "--dry-run", *TRAIN, "launcher=slurm", "launcher.queue=long")
    assert code == 2 and "launcher.queue=long means nothing to launcher=slurm" in error and "launcher=pbs" in error


def test_its_configuration_is_stored_and_read_back(tmp_path: Path) -> None:
    config = compose([*TRAIN, "launcher.queue=long"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config and compose(["@config.yaml"]) == config
