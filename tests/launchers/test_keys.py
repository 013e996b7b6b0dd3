"""Every key of every launcher is applied, or refused by its name before anything starts."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.main import main
from dtrain.launchers import probe, registry
from dtrain.launchers.background import MpiLauncher
from dtrain.launchers.elastic_agent import launch
from dtrain.launchers.environment import ALLOCATED
from dtrain.launchers.failure import Ending
from dtrain.launchers.launcher import Allocation, Launcher
from dtrain.launchers.probe import FOLDER, HANG_SECONDS

OTHERS: dict[str, Any] = {
    "workers": 2, "nodes": 2, "max_restarts": 7, "grace_seconds": 7.0, "threads_per_worker": 7, "hang_seconds": 7.0,
    "wait": True, "environment": ["COLOUR=blue"], "snapshot": False, "minutes": 77, "gpus_per_node": 7,
    "memory_gib": 7, "partition": "p7", "account": "a7", "qos": "q7", "constraint": "c7", "exclude": "n7",
    "reservation": "r7", "array_parallel": 7, "per_node": "torchrun", "isolate": "replica", "signal_seconds": 77,
    "address": "10.7.7.7", "port": 7777, "interface": "lo", "python": "python3", "setup": ["module load seven"],
    "container": "image7", "container_runtime": "apptainer", "container_args": ["--seven"], "srun_args": ["--seven"],
    "sbatch": ["mail-type=END"], "groups": ["nodes=1 workers=7"], "mpirun": "mpirun7", "hosts": ["h7"],
    "mpi_args": ["--seven"],
}  # fmt: skip
"""A value of each key that is not its default."""
SATISFIED = {"wait", "snapshot"}  # ask for what a local or an MPI job does anyway; wait is the command's
ELSEWHERE = {
    *(("mpi", key.name) for key in dataclasses.fields(Allocation)),  # of salloc, before the process that starts mpirun
    ("mpi", "nodes"),
    ("slurm", "array_parallel"),  # of sweeps
    ("slurm", "grace_seconds"),  # of the worker
}
"""What is applied outside of the launcher."""
NEEDS: dict[str, dict[str, Any]] = {
    "container_runtime": {"container": "image"}, "container_args": {"container": "image"},
    "isolate": {"nodes": 2, "workers": 2}, "nodes": {"workers": 2},
}  # fmt: skip


def test_every_key_is_tried() -> None:
    assert {*registry.keys()} == {"name", *OTHERS}


@pytest.mark.parametrize("launcher", registry.names())
@pytest.mark.parametrize("key", OTHERS)
def test_a_key_is_applied_or_refused(launcher: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOCATED, "1")
    plain = {"name": launcher, "workers": 1, **(NEEDS.get(key, {}) if launcher == "slurm" else {})}
    given = {**plain, key: OTHERS[key]}
    if launcher not in registry.keys()[key].launchers:
        with pytest.raises(registry.UnusedKeys, match=rf"launcher\.{key}"):
            registry.made(given)
    elif (launcher, key) == ("local", "nodes"):
        (problem,) = registry.made(given).problems()
        assert "launcher.nodes=2" in problem
    elif key not in SATISFIED and (launcher, key) not in ELSEWHERE:
        assert _shown(registry.made(given), tmp_path) != _shown(registry.made(plain), tmp_path)


def _shown(launcher: Launcher, tmp_path: Path) -> str:
    """All that a launcher was told, and for Slurm the script."""
    assert launcher.problems(2) == []
    if launcher.arrays:
        return launcher.render(["python", "x.py"], folder=tmp_path, name="x", replicas=2)
    return repr(launcher)


@pytest.mark.parametrize("launcher", registry.names())
def test_a_value_out_of_range_is_named(launcher: str) -> None:
    for key in dataclasses.fields(registry.launcher_class(launcher)):  # type: ignore[arg-type]  # they are dataclasses
        if "least" in key.metadata or "choices" in key.metadata:
            problem, *_ = registry.made({"name": launcher, key.name: key.metadata.get("least", 1) - 1}).problems()
            assert re.match(rf"launcher\.{key.name} (must be at least 1|must be 0 or more, but is -1|is 0 \()", problem)


def test_mpi_takes_the_keys_of_an_allocation_only_where_it_asks_for_one() -> None:
    two = MpiLauncher(workers=2, nodes=2, partition="gpu")
    assert not two.unused_keys({}) and not two.unused_keys({ALLOCATED: "1", "SLURM_JOB_ID": "7"})
    for variables, config in (
        ({"SLURM_JOB_ID": "7"}, two),
        ({}, dataclasses.replace(two, nodes=1)),
        ({}, dataclasses.replace(two, hosts=("a", "b"))),
    ):
        (problem,) = config.unused_keys(variables)
        assert problem.startswith("launcher.partition=gpu is for the nodes that launcher=mpi asks Slurm for")


def texts(folder: Path) -> None:
    (folder / "text").mkdir()
    for number in range(6):
        (folder / "text" / f"{number}.txt").write_text("\n".join(f"{i} times {number}" for i in range(400)))


@pytest.mark.parametrize("verb", ["train", "launch"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launcher.partition=gpu", "launcher.partition=gpu means nothing to launcher=local"),
        ("launcher.port=29500", "launcher.port=29500 means nothing to launcher=local"),
        ("launcher.interface=nope", "launcher.interface=nope: this machine has no network interface nope"),
        ("launcher.python=/no/python", "launcher.python=/no/python: there is no such interpreter"),
        ("launcher.nodes=2", "launcher=local has one node"),
    ],
)
def test_what_a_local_run_would_ignore_is_refused(
    verb: str, word: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path)
    words = [verb, "run.dir=run", word, *(["data=text", "data.path=text"] if verb == "train" else ["--", "true"])]
    assert main(words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_keys_of_a_local_run_reach_the_ranks_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def launch(argv: list[str], **how: Any) -> Ending:
        asked.update(how, argv=argv)
        return Ending("failed", None, 0, ())

    monkeypatch.setattr("dtrain.launchers.elastic_agent.launch", launch)
    monkeypatch.chdir(tmp_path)
    texts(tmp_path)
    given = [
        "environment=[COLOUR=blue]",
        "interface=lo",
        "hang_seconds=7",
        "python=/usr/bin/python3",
        "grace_seconds=7",
    ]
    words = ["data=text", "data.path=text", "run.dir=run", *(f"launcher.{word}" for word in given)]
    assert main(["train", *words]) == 1
    environment = asked["environment"]
    assert (environment["COLOUR"], environment["GLOO_SOCKET_IFNAME"]) == ("blue", "lo")
    assert (environment[HANG_SECONDS], environment[FOLDER]) == ("7", str(tmp_path / "run" / "ranks"))
    assert (asked["grace_seconds"], asked["argv"][0]) == (7, "/usr/bin/python3")


@pytest.mark.processes
def test_a_rank_of_this_machine_that_hangs_is_told_by_what_it_waited_for(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(
        "import os, time\n"
        "from dtrain.launchers.probe import note_collective\n"
        "if os.environ['RANK'] == '0': note_collective('replicate', 'AllReduce', 4, 10, 'float32')\n"
        "time.sleep(60)\n"
    )
    ending = launch(
        [sys.executable, probe.__file__, str(tmp_path / "hangs.py")], workers=2, log_folder=tmp_path / "logs",
        max_restarts=0, grace_seconds=5, threads_per_worker=1,
        environment={FOLDER: str(tmp_path / "ranks"), HANG_SECONDS: "0.5", probe.BEAT_SECONDS: "0.2"},
    )  # fmt: skip
    assert ending.kind == "failed" and ending.failures[0].rank == 0
    assert "in AllReduce #4 of group replicate" in ending.failures[0].message
    assert "longer than launcher.hang_seconds=0.5" in ending.failures[0].message
