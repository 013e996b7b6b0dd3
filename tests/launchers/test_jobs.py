"""Jobs without a scheduler: functions and programs, how they end, and what is said about it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from dtrain.launchers import job_list as registry
from dtrain.launchers.background import LocalLauncher
from dtrain.launchers.code_copy import Snapshot
from dtrain.launchers.job import Facts, JobFailed
from dtrain.launchers.rank import under_probe

pytestmark = pytest.mark.processes

LEAVES = "import os, sys; sys.exit({1: %d}.get(int(os.environ['RANK']), %d))"


@pytest.fixture(autouse=True)
def _registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def place() -> tuple[int, str]:
    return int(os.environ["RANK"]), os.environ["WORLD_SIZE"]


def fail() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("no luck")
    time.sleep(30)


def test_a_function_returns_what_each_rank_returned(tmp_path: Path) -> None:
    job = LocalLauncher(workers=3).submit(lambda: place(), folder=tmp_path / "job")
    assert job.result(50) == [(0, "3"), (1, "3"), (2, "3")]
    assert job.state() == "finished" and "finished" in job.why()


def test_the_result_of_a_failed_function_is_its_root_cause(tmp_path: Path) -> None:
    job = LocalLauncher(workers=2).submit(lambda: fail(), folder=tmp_path / "job")
    with pytest.raises(JobFailed) as error:
        job.result(50)
    first, second, *_ = str(error.value).splitlines()
    assert first.startswith("rank 1 on ") and first.endswith("failed: ValueError: no luck")
    assert f"{Path(__file__)}:" in second and "in fail" in second


@pytest.mark.parametrize(
    ("codes", "state", "code"),
    [((0, 0), "finished", 0), ((75, 75), "failed", 75), ((0, 2), "failed", 2), ((0, 7), "failed", 1)],
)  # fmt: skip
def test_the_exit_codes_of_the_ranks_decide(codes: tuple[int, int], state: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES % (codes[1], codes[0]))
    job = LocalLauncher(workers=2).submit(["python", str(script)], folder=tmp_path / "job")
    end = (job.wait(50), job.end())
    assert end[0] == state and end[1] is not None and end[1]["code"] == code


def test_a_cancelled_job_gives_its_ranks_the_time_to_leave(tmp_path: Path) -> None:
    script = tmp_path / "stops.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(50)\n"
    )
    job = LocalLauncher(workers=1).submit(["python", str(script)], folder=tmp_path / "job")
    log = tmp_path / "job" / "logs" / "rank-0.log"
    while not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.05)
    job.cancel()
    assert job.wait(40) == "cancelled"
    assert "cancelled" in job.why()


def test_jobs_are_found_by_id_name_and_folder(tmp_path: Path) -> None:
    job = LocalLauncher(workers=1).submit(["true"], folder=tmp_path / "job", name="mine")
    job.wait(40)
    assert {registry.find(name).id for name in (job.id, "mine", str(tmp_path / "job"))} == {job.id}
    assert [found.id for found in registry.jobs()] == [job.id]
    with pytest.raises(LookupError, match=f"there is no job 12x \\(there are {job.id}\\)"):
        registry.find("12x")
    assert Facts.read(tmp_path / "job").program == ("true",)


def test_a_folder_whose_job_runs_is_not_used_twice(tmp_path: Path) -> None:
    job = LocalLauncher(workers=1).submit(["sleep", "40"], folder=tmp_path / "job")
    try:
        with pytest.raises(ValueError, match="which still runs; cancel it"):
            LocalLauncher(workers=1).submit(["true"], folder=tmp_path / "job")
    finally:
        job.cancel()
        job.wait(40)


def test_a_program_that_does_not_exist_is_told_by_name(tmp_path: Path) -> None:
    job = LocalLauncher(workers=1).submit(["no-such-program"], folder=tmp_path / "job")
    assert job.wait(40) == "failed"
    assert "cannot start no-such-program: No such file or directory" in job.why()


@pytest.mark.parametrize(
    ("program", "probed"),
    [
        (["python", "-u", "train.py", "-x"], ["train.py", "-x"]),
        (["/venv/bin/python3.11", "-m", "mine"], ["-m", "mine"]),
        (["python", "-c", "pass"], None),
        (["bash", "run.sh"], None),
    ],
)
def test_python_programs_run_under_the_probe(program: list[str], probed: list[str] | None) -> None:
    found = under_probe(program)
    if probed is None:
        assert found == program
    else:
        assert found[0] == program[0] and found[-len(probed) :] == probed
        assert found[-len(probed) - 1].endswith("launchers/probe.py")


def test_a_snapshot_keeps_the_code_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    (source / "mine").mkdir(parents=True)
    (source / "train.py").write_text("first")
    (source / "mine" / "__init__.py").write_text("")
    (source / "venv").mkdir()
    (source / "venv" / "pyvenv.cfg").write_text("")
    (source / "venv" / "big.py").write_text("")
    monkeypatch.chdir(source)
    snapshot = Snapshot.of(source, run / "code")
    snapshot.take()
    (source / "train.py").write_text("second")
    assert (run / "code" / "train.py").read_text() == "first"
    copied = sorted(str(path.relative_to(run / "code")) for path in (run / "code").rglob("*.py"))
    assert copied == ["mine/__init__.py", "train.py"]
    assert snapshot.mapped(["python", "train.py", "data.py"]) == ("python", f"{run}/code/train.py", "data.py")
    assert snapshot.variables["DTRAIN_CODE"] == str(run / "code")
    assert sys.executable
