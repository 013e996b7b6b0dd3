"""One trainer in one folder, whatever starts a second one there, and however the first one was lost."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtrain.cli.main import main
from dtrain.errors import ConfigError
from dtrain.launchers.background import LocalLauncher
from dtrain.launchers.job import Job
from dtrain.launchers.lock import InUse, held
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.train.config import Config, run_folder
from tests.fakes.fake_slurm import FakeSlurm

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

TRAIN = [
    "launcher.workers=1", "mesh.replicate=1", "mesh.shard=1", "engine=ddp", "sync=dense", "data=text", "train.steps=4",
    "train.batch_size=2", "train.evaluation_examples=0", "model.dim=32", "model.layers=1", "data.block=16",
]  # fmt: skip
WAITS = ["python", "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DTRAIN_CLUSTER", "fake")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text("\n".join(f"{i} times {number}" for i in range(40)))


@pytest.fixture
def slurm() -> Iterator[FakeSlurm]:
    with FakeSlurm(nodes=2) as fake:
        yield fake


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def log(job: Job, rank: int = 0) -> str:
    path = job.folder / "logs" / f"rank-{rank}.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_nothing_starts_in_the_folder_of_a_job_that_runs(
    launcher: str, slurm: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    starter = LocalLauncher() if launcher == "local" else SlurmLauncher(snapshot=False)
    job = starter.submit(WAITS, folder=run)
    try:
        until(lambda: "up" in log(job))
        before = sorted(path.name for path in run.iterdir())
        train, launch = ["train", *TRAIN, "data.path=text"], ["launch", "launcher.workers=1"]
        for words in (train, [*train, "launcher=slurm", "launcher.snapshot=false"], [*launch, "--", "true"]):
            assert main([*words[:1], f"run.dir={run}", *words[1:]]) == 2
            assert f"holds job {job.id}, which is running" in capfd.readouterr().err
        os.rename(run / "job.json", tmp_path / "job.json")  # lost, or of another machine
        assert main([*train, f"run.dir={run}"]) == 2
        assert "is in use by another dtrain: wait, or choose another (rank 0 of a job" in capfd.readouterr().err
        os.rename(tmp_path / "job.json", run / "job.json")
        assert sorted(path.name for path in run.iterdir()) == before and job.state() == "running"
    finally:
        job.cancel()
        job.wait(40)
    if launcher == "local":  # FakeSlurm's jobs are over at once
        with held(run, "the test", seconds=10):
            pass


def test_launch_stays_out_of_a_folder_in_which_train_trains(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with held(run, "a dtrain command"):
        assert main(["launch", "launcher.workers=1", f"run.dir={run}", "--", "true"]) == 2
    assert "is in use by another dtrain: wait, or choose another (a dtrain command" in capfd.readouterr().err
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_ranks_whose_srun_was_killed_are_gone_before_others_begin(slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, signal, sys, time\n"
        "attempt, rank = os.environ['DTRAIN_ATTEMPT'], os.environ['RANK']\n"
        "open(f'pid-{attempt}-{rank}', 'w').write(str(os.getpid()))\n"
        "if attempt == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
        "for other in '01':\n"
        "    pid = open(f'pid-0-{other}').read()\n"
        "    try: state = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0]\n"
        "    except OSError: state = 'gone'\n"
        "    print('rank', other, 'of the attempt before is', 'gone' if state in 'ZX' else state, flush=True)\n"
    )
    launcher = SlurmLauncher(nodes=2, workers=2, max_restarts=2, snapshot=False)
    job = launcher.submit(["python", "program.py"], folder=tmp_path / "run")
    until(lambda: "up" in log(job, 0) and "up" in log(job, 1))
    for pid in _sruns(tmp_path / "run"):
        os.kill(pid, signal.SIGKILL)
    assert job.wait(50) == "finished", (job.folder / "logs" / "batch.log").read_text()
    for rank in (0, 1):
        assert log(job, rank).splitlines()[-2:] == [f"rank {n} of the attempt before is gone" for n in (0, 1)]


def _sruns(folder: Path) -> list[int]:
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    found = [line for line in listed.splitlines() if " srun --" in line and f"launchers.rank {folder} --" in line]
    assert found, listed
    return [int(line.split()[0]) for line in found]


def test_a_rank_waits_for_the_lock_of_one_that_is_on_its_way_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-P", "-m", "dtrain.launchers.rank", str(run), "--", "echo", "so it is"]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    with held(run, "an orphan"):
        rank = subprocess.Popen(command, env=environment)
        until((run / "ranks" / "rank-0.json").exists)
        time.sleep(0.3)
        assert rank.poll() is None and "so it is" not in (run / "logs" / "rank-0.log").read_text()
    assert rank.wait(20) == 0 and "so it is" in (run / "logs" / "rank-0.log").read_text()


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    text = (
        f"from dtrain.launchers.lock import held; from pathlib import Path\nwith held(Path({str(tmp_path)!r}), 'x'):\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", text + "    print('in', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"in\n"
    with pytest.raises(InUse, match=f"is in use by x, process {holder.pid} on "), held(tmp_path, "y"):
        pass
    holder.kill()
    holder.communicate()
    with held(tmp_path, "y") as locks:
        assert locks


# ---- at the same moment --------------------------------------------------------------------------------------------


def test_folders_that_are_made_at_the_same_moment_are_different_ones(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(run_folder.made, [tmp_path / "day" / "now"] * 16))
    assert len(set(made)) == 16 and all(path.is_dir() for path in made)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another run"):
        run_folder.made(tmp_path / "file" / "x")


def test_launches_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def now(config: Config, name: str) -> Config:  # each saw that the name was free
        return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"runs/day/now-{name}"))

    monkeypatch.setattr("dtrain.train.config.composition._with_default_folder", now)
    for word in ("first", "second"):
        assert main(["launch", "launcher.workers=1", "--", "echo", word]) == 0
    logs = [tmp_path / "runs" / "day" / name / "logs" / "rank-0.log" for name in ("now-launch", "now-launch-2")]
    assert [log.read_text().splitlines()[-1] for log in logs] == ["first", "second"]
