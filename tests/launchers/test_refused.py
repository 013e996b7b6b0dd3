"""What no launcher could run, or would run again and again, is told before; and what only warns."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.cli.main import main
from dtrain.launchers import job_list as registry
from dtrain.launchers.background import LocalLauncher
from dtrain.launchers.slurm import client, refusal
from dtrain.launchers.slurm.client import SlurmError, ask
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.launchers.slurm.refusal import problems, too_many_cpus


@pytest.fixture(autouse=True)
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Slurm's commands: two partitions."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DTRAIN_CLUSTER", "fake")
    monkeypatch.setenv("SLURM_CONF", "fake")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "stubs"
    folder.mkdir()
    says(folder / "sinfo", 'case "$*" in *%c) ;; *) echo "main*|2|infinite|up"; echo "debug|1|30:00|up";; esac')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def says(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# ---- Slurm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sbatch": ("mail-type=END\ntouch x",)}, "launcher.sbatch='mail-type=END\\ntouch x' holds a line break"),
        ({"partition": "main\n"}, "launcher.partition='main\\n' holds a line break"),
        ({"constraint": "a\x07"}, "launcher.constraint='a\\x07' holds the control character '\\x07'"),
    ],
)
def test_a_setting_that_is_no_single_line_is_refused(how: dict[str, object], said: str) -> None:
    (problem,) = SlurmLauncher(**how).problems()  # type: ignore[arg-type]  # names of its fields
    assert problem.startswith(said)


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("a\nb", "run", "the job's name 'a\\nb' holds a line break: choose another --name"),
        ("x", "run\nb", "run\\nb' holds a line break: choose another run.dir"),
        ("x", "r\\un", "holds a backslash, below which Slurm writes no log: choose another run.dir"),
    ],
)
def test_names_that_no_directive_can_hold_are_refused_by_their_names(
    name: str, folder: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds") as error:
        SlurmLauncher(snapshot=False).submit(["true"], folder=tmp_path / folder, name=name)
    assert said in str(error.value) and not (tmp_path / folder).exists()


def test_a_percent_sign_in_a_folder_is_one_in_the_log(tmp_path: Path) -> None:
    launcher = SlurmLauncher(snapshot=False)
    text = launcher.render(["true"], folder=tmp_path / "w100%j")
    assert f"--output={tmp_path}/w100%%j/logs/batch.log\n" in text
    text = launcher.render_array(["true"], folders=[tmp_path / "a%j" / "1", tmp_path / "a%j" / "2"])
    assert "/a%%j/sweep-array/batch-%a.log\n" in text


def test_of_several_partitions_one_that_will_do_is_enough(tmp_path: Path) -> None:
    def told(**how: object) -> list[str]:
        return problems(SlurmLauncher(**how), tmp_path, one_machine=True)  # type: ignore[arg-type]  # its fields

    assert told(partition="main,debug", nodes=2, workers=2) == []
    assert told(partition="debug,main", minutes=60) == []
    (problem,) = told(partition="main,gpu")
    assert problem == "there is no partition gpu (there are main, debug); set launcher.partition"
    assert len(told(partition="main,debug", nodes=3, workers=3)) == 3
    known = {"main": [4, 4], "debug": [16]}
    assert not list(too_many_cpus(SlurmLauncher(partition="main,debug", threads_per_worker=16), known))
    assert list(too_many_cpus(SlurmLauncher(partition="main,debug", threads_per_worker=32), known))


def test_commands_without_a_controller_tell_the_way_out(stubs: Path) -> None:
    says(stubs / "sinfo", "echo 'sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host' >&2; exit 1")
    with pytest.raises(
        SlurmError, match=r"sinfo reaches no Slurm controller .*dns_srv.*login host.*SLURM_CONF.*cluster up"
    ):
        ask("sinfo")


# ---- a program that is not there -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (["python", "nosuch.py"], "there is no nosuch.py in"),
        (["no-such-program"], "there is no program no-such-program on PATH"),
    ],
)
def test_a_program_that_is_not_here_is_refused(
    program: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "run.dir=run", "--", *program]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.processes
def test_a_rank_that_cannot_start_its_program_is_started_once(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "run.sh").write_text("nosuch\n")
    programs = {
        "python nosuch.py": "cannot start nosuch.py: there is no such file in",
        "python -m nosuch.module": "cannot start python -m nosuch.module: there is no such module",
        "python bad.py": "SyntaxError",
        "bash run.sh": "nosuch: command not found",
    }
    launcher = LocalLauncher(max_restarts=2)
    jobs = {name: launcher.submit(name.split(), folder=tmp_path / name) for name in programs}  # all at once
    for name, said in programs.items():
        assert jobs[name].wait(50) == "failed", name
        end = jobs[name].end()
        assert end is not None and end["code"] == 2 and said in jobs[name].why(), name
        assert (tmp_path / name / "logs" / "rank-0.log").read_text().count("---- rank 0") == 1, name


@pytest.mark.parametrize("name", ["a\nb", "../x", ""])
def test_a_name_that_is_no_part_of_a_path_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--name", name, "--", "true"]) == 2
    assert "a job's name is one line without a slash" in capsys.readouterr().err


def test_what_sinfo_says_in_another_way_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"%P|%D|%l|%a": "main*|1.5K|infinite|up\n", "%P|%D|%c": "main*|4|2\nmain*|1.5K|64+\n"}
    for module in (client, refusal):
        monkeypatch.setattr(module, "ask", lambda *command, **_: answers[command[-1]])
    settings = SlurmLauncher(nodes=900, workers=900, threads_per_worker=32)
    assert problems(settings, tmp_path, one_machine=True) == []
    answers["%P|%D|%l|%a"] = "main*|4|infinite|up\n"
    assert any("has 4 nodes" in problem for problem in problems(settings, tmp_path, one_machine=True))


@pytest.mark.processes
def test_launch_stays_out_of_a_training_runs_folder_and_tells_no_old_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "data.json").write_text("{}")
    assert main(["launch", "launcher.workers=1", "run.dir=trained", "--", "echo", "x"]) == 2
    assert "holds a training run of dtrain" in capsys.readouterr().err
    for word in ("first", "second"):
        assert main(["launch", "launcher.workers=1", "run.dir=run", "--", "echo", word]) == 0
    told = capsys.readouterr().out
    assert told.count("first\n") == 1 and told.count("second\n") == 1


# ---- what only warns, and how a command ends -------------------------------------------------------------------------


@pytest.mark.processes
def test_a_job_runs_whose_home_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/proc")
    assert main(["launch", "launcher.workers=1", "run.dir=run", "--", "echo", "here"]) == 0
    said = capsys.readouterr()
    assert "here" in said.out and f"it is found by its folder, dtrain jobs status {tmp_path / 'run'}" in said.err
    assert registry.find(str(tmp_path / "run")).state() == "finished" and registry.jobs() == []


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_a_launch_that_is_ended_ends_its_ranks_and_waits_for_them(tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('checkpointed', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with contextlib.ExitStack() as stack:
        commands = {}
        for number in (signal.SIGTERM, signal.SIGHUP):  # both at once
            words = ["launch", "launcher.workers=1", f"run.dir={number.name}", "--", "python", "stops.py"]
            commands[number] = stack.enter_context(subprocess.Popen([sys.executable, "-m", "dtrain", *words]))
            stack.callback(commands[number].kill)
        deadline = time.monotonic() + 120
        logs = {number: tmp_path / number.name / "logs" / "rank-0.log" for number in commands}
        while not all(log.exists() and "ready" in log.read_text() for log in logs.values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number, command in commands.items():
            command.send_signal(number)
        for number, command in commands.items():
            assert command.wait(100) == 130 and "checkpointed" in logs[number].read_text(), number
            assert registry.find(str(tmp_path / number.name)).state() == "cancelled"
