"""Submitting, watching and cancelling without Slurm: FakeSlurm runs the real scripts as processes of this machine."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.launchers.job import Job
from dtrain.launchers.slurm.client import SlurmError, minutes_of
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.launchers.slurm.refusal import problems
from tests.fakes.fake_slurm import FakeSlurm

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def _slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DTRAIN_CLUSTER", "fake")  # its nodes are this machine: they share its disks
    monkeypatch.chdir(tmp_path)
    with FakeSlurm(nodes=2):
        yield


def launcher(**how: object) -> SlurmLauncher:
    settings: dict[str, object] = {"nodes": 2, "workers": 2, "max_restarts": 1, **how}
    return SlurmLauncher(**settings)  # type: ignore[arg-type]  # its keys


def program(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "program.py").write_text(text)
    return ["python", "program.py"]


def log(job: Job, rank: int) -> str:
    return (job.folder / "logs" / f"rank-{rank}.log").read_text()


def place() -> tuple[str, str, str]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["GROUP_RANK"]


def test_a_function_runs_once_per_rank(tmp_path: Path) -> None:
    job = launcher().submit(lambda: place(), folder=tmp_path / "job")
    assert job.result(50) == [("0", "2", "0"), ("1", "2", "1")]


def test_pain_2_a_name_that_does_not_resolve_is_replaced_by_the_nodes_address(tmp_path: Path) -> None:
    job = launcher().submit(program(tmp_path, "import os; print(os.environ['MASTER_ADDR'])"), folder=tmp_path / "job")
    assert job.wait(50) == "finished" and "127.0.0.1" in log(job, 1)


def test_pain_20_a_program_that_says_75_is_run_again(tmp_path: Path) -> None:
    text = (
        "import os, sys\n"
        "os.makedirs('checkpoints', exist_ok=True)\n"
        "mark = 'mark-' + os.environ['RANK']\n"
        "again = os.path.exists(mark)\n"
        "open(mark, 'w').close()\n"
        "sys.exit(0 if again else 75)\n"
    )
    job = launcher().submit(program(tmp_path, text), folder=tmp_path / "job")
    assert job.wait(50) == "finished"
    assert len((job.folder / "attempts").read_text().splitlines()) == 2
    assert log(job, 0).count("---- rank 0") == 2


def test_a_job_without_progress_gives_up(tmp_path: Path) -> None:
    job = launcher().submit(program(tmp_path, "raise ValueError('always')"), folder=tmp_path / "job")
    assert job.wait(50) == "failed"
    assert "attempts in a row without progress: 2" in job.why() and "ValueError: always" in job.why()


def test_a_rank_that_was_killed_in_an_earlier_attempt_is_told(tmp_path: Path) -> None:
    text = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1' and os.environ['DTRAIN_ATTEMPT'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(50 if os.environ['DTRAIN_ATTEMPT'] == '0' else 0)\n"
    )
    job = launcher().submit(program(tmp_path, text), folder=tmp_path / "job")
    assert job.wait(50) == "finished"
    killed = re.compile(r"attempt 1: rank 1 on \S+ was killed by SIGKILL; the run went on as attempt 2")
    assert killed.search(job.why()), job.why()
    said = (job.folder / "logs" / "batch.log").read_text()
    assert re.search(r"the ranks failed \(rank 1 on \S+ first: SIGKILL, exit code 137\); they start again", said), said


def test_a_wrong_configuration_is_not_run_again(tmp_path: Path) -> None:
    job = launcher().submit(program(tmp_path, "import sys; sys.exit(2)"), folder=tmp_path / "job")
    assert job.wait(50) == "failed" and len((job.folder / "attempts").read_text().splitlines()) == 1


def test_a_cancelled_job_is_not_run_again(tmp_path: Path) -> None:
    job = launcher().submit(
        program(tmp_path, "import time; print('up', flush=True); time.sleep(50)"), folder=tmp_path / "job"
    )
    while not ((job.folder / "logs" / "rank-1.log").exists() and "up" in log(job, 1)):
        time.sleep(0.05)
    assert job.state() == "running"
    job.cancel()
    assert job.wait(50) == "cancelled" and len((job.folder / "attempts").read_text().splitlines()) == 1


def test_an_array_runs_every_folder(tmp_path: Path) -> None:
    folders = [tmp_path / "array" / name for name in ("a", "b")]
    text = program(tmp_path, "import sys; print(sys.argv[1], flush=True)")
    jobs = launcher(nodes=1, workers=1).submit_array([*text, "{folder}/x"], folders=folders)
    assert [job.wait(50) for job in jobs] == ["finished", "finished"]
    assert [log(job, 0).splitlines()[-1] for job in jobs] == [f"{folder}/x" for folder in folders]


def test_a_job_runs_the_code_that_it_was_submitted_with(tmp_path: Path) -> None:
    text = program(tmp_path, "import mine, time; time.sleep(1); print(mine.WORD)")
    (tmp_path / "mine.py").write_text("WORD = 'first'")
    job = launcher(nodes=1, workers=1).submit(text, folder=tmp_path / "job")
    (tmp_path / "mine.py").write_text("WORD = 'second'")
    assert job.wait(50) == "finished" and "first" in log(job, 0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"nodes": 3, "workers": 3}, "partition main has 2 nodes, so the job would wait for ever"),
        ({"partition": "gpu"}, "there is no partition gpu (there are main)"),
        ({"workers": 3}, "cannot be spread evenly"),
    ],
)
def test_what_would_never_start_is_refused(how: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="launcher") as error:
        launcher(**how).submit(["true"], folder=tmp_path / "job")
    assert words in str(error.value) and not (tmp_path / "job").exists()


def test_a_folder_of_this_machine_alone_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(SlurmLauncher(nodes=2, workers=2), Path("/dev/shm/run"))
    assert "is on a disk of this machine alone" in problem and "choose run.dir" in problem


def test_without_slurm_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match=r"there is no sinfo on PATH.*dtrain cluster up"):
        launcher().submit(["true"], folder=tmp_path / "job")


@pytest.mark.parametrize(
    ("text", "minutes"), [("1-00:00:00", 1440), ("2:30:00", 150), ("45:00", 45), ("infinite", None)]
)
def test_time_limits_are_read(text: str, minutes: int | None) -> None:
    assert minutes_of(text) == minutes
