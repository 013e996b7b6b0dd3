"""Which job a number means: clusters come and go, their numbers begin again, folders go on as other jobs."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import jobs
from dtrain.cli.main import main
from dtrain.errors import ConfigError
from dtrain.launchers import job_list as registry
from dtrain.launchers.job import Facts
from dtrain.launchers.registry import open_job
from dtrain.launchers.slurm import client
from dtrain.launchers.slurm import job as slurm_job
from dtrain.launchers.slurm.client import SlurmError
from dtrain.train.config import run_folder

NOW = time.time()


class Slurm:
    """A controller: number -> what it shows of the job."""

    def __init__(self, conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.conf = conf
        self.comes_up(NOW - 1000)
        monkeypatch.setattr(client, "ask", self.ask)
        monkeypatch.setattr(slurm_job, "ask", self.ask)

    def comes_up(self, when: float) -> None:
        """The cluster is made anew: it knows no job."""
        self.conf.write_text("ClusterName=dev\n")
        os.utime(self.conf, (when, when))
        self.shown.clear()

    def has(self, facts: Facts, state: str = "RUNNING", log: str = "") -> None:
        log = log or f"{facts.folder}/logs/batch.log"
        self.shown[facts.id] = (
            f"JobId=1 JobName={facts.name} JobState={state} Reason=Priority NodeList=(null) StdOut={log} "
        )

    def ask(self, *command: str, seconds: float = 1) -> str:
        if command[0] == "scancel":
            self.cancelled.append(command[1])
            return ""
        number = command[4]
        if number not in self.shown or command[0] == "squeue":
            raise SlurmError("slurm_load_jobs error: Invalid job id specified")
        return self.shown[number]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DTRAIN_CLUSTER", "dev")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.chdir(tmp_path)
    return Slurm(tmp_path / "slurm.conf", monkeypatch)


def submitted(tmp_path: Path, number: str, name: str, *, ago: float = 100.0, **how: Any) -> Facts:
    folder = tmp_path / how.pop("folder", name)
    folder.mkdir(exist_ok=True, parents=True)
    facts = Facts(number, "slurm", name, str(folder), ("true",), 1, NOW - ago, **how)
    facts.write()
    registry.add(facts)
    return Facts.read(folder)


def run(*words: str) -> int:
    return main(["jobs", *words])


def test_a_number_of_a_cluster_that_went_down_is_not_answered_to(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = submitted(tmp_path, "11", "old")
    slurm.comes_up(NOW - 50)
    slurm.shown["11"] = "JobId=11 JobName=stranger JobState=RUNNING NodeList=n1 StdOut=/elsewhere "
    assert run("status", "11") == 2 and run("cancel", "11") == 2
    said = capsys.readouterr().err
    assert "there is no job 11 here" in said and f"11 (slurm) old, cluster dev: {old.folder}" in said
    assert run("status", old.folder) == 0
    shown = capsys.readouterr().out
    assert "old: lost" in shown and "waits for" not in shown and "nodes" not in shown
    assert run("cancel", old.folder) == 1 and not slurm.cancelled
    assert registry.jobs() == [] and [job.id for job in registry.every()] == ["11"]


def test_only_a_clusters_job_is_asked_for_on_a_login_host(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entered: list[object] = []
    monkeypatch.setattr(jobs, "enter_login_host", entered.append)
    theirs = submitted(tmp_path, "11", "theirs")
    mine = dataclasses.replace(theirs, launcher="local", folder=str(tmp_path / "mine"))
    Path(mine.folder).mkdir()
    mine.write()
    assert run("status", mine.folder) == 0 and not entered  # whichever clusters are up
    assert run("status", theirs.folder) == 0 and run("list") == 0 and run("table", theirs.folder, mine.folder) == 2
    assert len(entered) == 3


def test_names_that_no_file_can_have_are_no_jobs(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = submitted(tmp_path, "11", "each")
    known = next(registry.folder().glob("*-11"))
    strange = dataclasses.replace(facts, id="12", folder="9" * 3000)
    known.with_name(f"{known.name[:-2]}12").write_text(json.dumps(dataclasses.asdict(strange)))
    assert [job.id for job in registry.every()] == ["11"]
    assert run("status", "9" * 3000) == 2 and "there is no job 999" in capsys.readouterr().err
    assert run("table", "9" * 3000) == 2


def test_the_folder_of_a_sweep_names_its_jobs(slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, folder in (("7", "sw/0-a"), ("8", "sw/1-b"), ("9", "alone")):
        slurm.has(submitted(tmp_path, number, "each", folder=folder, ago=100 - int(number)), "PENDING")
    with pytest.raises(LookupError, match="no job's and no run's"):
        registry.resolve("sw")
    (tmp_path / "sw" / "sweep.json").write_text("[]")
    assert [job.id for job in registry.resolve("sw")] == ["7", "8"]
    assert run("cancel", "sw") == 0 and slurm.cancelled == ["7", "8"]


def test_a_live_clusters_job_that_is_not_asked_from_here_is_named(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = submitted(tmp_path, "11", "far", cluster="dev", came_up=NOW - 1000)

    def silent(*_: object, **__: object) -> str:
        raise SlurmError("scontrol reaches no Slurm controller")

    monkeypatch.setattr(client, "ask", silent)
    monkeypatch.setattr(client, "CLUSTERS", tmp_path / "run")
    (tmp_path / "run" / "dev").mkdir(parents=True)
    (tmp_path / "run" / "dev" / "slurm.conf").symlink_to(slurm.conf)
    with pytest.raises(ConfigError, match=r"holds job 11 of cluster dev, which is up .* dtrain jobs status"):
        run_folder.without_job(Path(facts.folder))
    slurm.comes_up(NOW - 50)
    run_folder.without_job(Path(facts.folder))  # it went with its cluster


def test_the_live_clusters_job_of_a_number_is_meant(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path, "11", "old")
    slurm.comes_up(NOW - 50)
    new = submitted(tmp_path, "11", "new", ago=10)
    slurm.has(new, "PENDING")
    assert registry.find("11").folder == Path(new.folder)
    assert run("status", "11") == 0
    shown = capsys.readouterr().out
    assert "new: pending" in shown and "  waits for: Priority\n" in shown and "nodes:" not in shown
    assert run("list") == 0 and "/old" not in capsys.readouterr().out
    assert run("list", "--all") == 0
    everything = capsys.readouterr().out.splitlines()
    assert "cluster" in everything[0] and len(everything) == 3 and "/old" in everything[2] and "lost" in everything[2]
    assert run("cancel", "11") == 0 and slurm.cancelled == ["11"]


def test_a_record_without_its_clusters_birth_belongs_to_none_that_came_up_later(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    facts = Facts("11", "slurm", "old", str(tmp_path / "old"), ("true",), 1, NOW - 2000, "dev")
    facts.write()
    registry.folder().mkdir(parents=True)
    (registry.folder() / "slurm-dev-11").write_text(f"{facts.folder}\n")  # as version 0.1 wrote it
    slurm.has(facts)
    with pytest.raises(LookupError, match="there is no job 11 here"):
        registry.find("11")


def test_a_job_of_another_cluster_is_not_asked_for_here(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    facts = Facts("11", "slurm", "far", str(tmp_path / "far"), ("true",), 1, NOW, "juwels")
    slurm.has(facts)
    job = open_job(facts)
    with pytest.raises(SlurmError, match="of cluster juwels, and this is dev: go to its login host"):
        job.state()
    with pytest.raises(SlurmError, match="of cluster juwels"):
        job.cancel()
    assert not slurm.cancelled


def test_a_job_is_cancelled_only_where_slurm_says_that_the_number_is_its_own(slurm: Slurm, tmp_path: Path) -> None:
    facts = submitted(tmp_path, "11", "mine")
    slurm.has(facts, log="/somebody/elses/batch.log")
    job = registry.find("11")
    assert job.state() == "lost"
    with pytest.raises(SlurmError, match="is another one now"):
        job.cancel()
    assert not slurm.cancelled


def test_a_job_whose_folder_went_on_as_another_is_told(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path, "17", "first", folder="run")
    slurm.has(submitted(tmp_path, "18", "second", folder="run", ago=50))
    assert run("status", "17") == 0
    assert "job 17 has ended" in (said := capsys.readouterr().out) and "went on as job 18" in said
    assert run("cancel", "17") == 2 and not slurm.cancelled
    assert [job.id for job in registry.jobs()] == ["18"]
    assert run("list", "--all") == 0 and "now 18" in capsys.readouterr().out


def test_several_jobs_of_one_number_are_refused_with_the_list(slurm: Slurm, tmp_path: Path) -> None:
    slurm.has(submitted(tmp_path, "11", "one"))
    (tmp_path / "two").mkdir()
    local = Facts("11", "local", "two", str(tmp_path / "two"), ("true",), 1, NOW)
    local.write()
    registry.add(local)
    assert registry.find("11").facts.name == "one"  # which runs
    slurm.shown.clear()
    with pytest.raises(LookupError, match=r"11 names 2 jobs(.|\n)*two, cluster -: .*(.|\n)*one, cluster dev: "):
        registry.find("11")


def test_the_number_of_an_array_stands_for_its_elements(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, state in enumerate(("RUNNING", "PENDING")):
        facts = submitted(tmp_path, f"19_{index}", "sweep", folder=f"sweep/{index}-train.seed={index}")
        slurm.has(facts, state, log=f"{tmp_path}/sweep/sweep-array/batch-{index}.log")
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    assert run("status", "19") == 0
    shown = capsys.readouterr().out.splitlines()
    assert "job array 19 (slurm) sweep: 2 jobs" in shown[0]
    assert "19_0" in shown[2] and "running" in shown[2] and "19_1" in shown[3] and "pending" in shown[3]
    assert run("logs", "19") == 2 and "19_0 19_1" in capsys.readouterr().err
    assert run("table", "19") == 0 and "run" in capsys.readouterr().out
    assert run("cancel", "19") == 0 and slurm.cancelled == ["19_0", "19_1"]


def test_launching_into_the_folder_of_a_job_that_runs_is_refused(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.has(submitted(tmp_path, "11", "mine"), "PENDING")
    assert main(["launch", "launcher=slurm", f"run.dir={tmp_path / 'mine'}", "--", "true"]) == 2
    assert "holds job 11, which is pending; cancel it or choose another" in capsys.readouterr().err
