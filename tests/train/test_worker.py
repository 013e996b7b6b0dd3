"""What a worker checks before it meets the others, and its last words."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest

from dtrain.errors import ConfigError
from dtrain.launchers.probe import HANG_SECONDS
from dtrain.launchers.records import ATTEMPT
from dtrain.report import summary
from dtrain.report.at_the_end import closing
from dtrain.train.config import compose
from dtrain.train.config.run_folder import write
from dtrain.train.mesh import patience
from dtrain.train.time_limit import TIME_LIMIT
from dtrain.train.trainer import Outcome
from dtrain.train.worker import check_interface, main
from tests.cli.test_cli import SUMMARY


@pytest.mark.parametrize("wanted", ["", "eth0", "eth0,lo"])
def test_interfaces_that_the_host_has_are_taken(wanted: str) -> None:
    check_interface(wanted, ["lo", "eth0"])


def test_an_interface_that_the_host_lacks_is_a_wrong_configuration() -> None:
    with pytest.raises(ConfigError, match=r"launcher.interface .* no network interface ib9, only eth0, lo"):
        check_interface("lo,ib9", ["lo", "eth0"])
    assert ConfigError.exit_code == 2  # which no launcher runs again


@pytest.mark.parametrize("watched", [False, True])
def test_the_log_tells_the_progress_and_the_summary_where_nobody_looks_on(
    watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text("\n".join(f"{i} times {number}" for i in range(40)))
    config = compose([
        "launcher.workers=1", "mesh.replicate=1", "mesh.shard=1", "engine=ddp", "sync=dense", f"run.dir={tmp_path}/run",
        f"data.path={tmp_path}/text", "data.block=16", "train.steps=4", "train.log_every_steps=2", "train.batch_size=2",
        "train.evaluation_examples=2", "train.evaluate_every_steps=0", "model.dim=32", "model.layers=1",
    ])  # fmt: skip
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    for name, value in (place | ({"TORCHELASTIC_RUN_ID": "x"} if watched else {})).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(ATTEMPT, raising=False)
    with warnings.catch_warnings():
        assert main([str(write(config, {}))]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("step ") and "/4" in line]
    assert [row.split()[1] for row in rows] == ([] if watched else ["2/4", "4/4"])
    assert all(part in row for row in rows for part in ("loss ", "tokens/s", "sent ", "exposed communication"))
    assert out.count("1 replica x 1 shard (ddp)") == out.count("step 4: validation loss") == (0 if watched else 1)


def test_the_log_closes_with_the_summary_or_with_what_ended_the_run(tmp_path: Path) -> None:
    assert closing(Outcome("signal", 7, signal.SIGTERM), tmp_path) == "SIGTERM: checkpointed at step 7"
    assert closing(Outcome("signal", 7, TIME_LIMIT), tmp_path) == "time limit: checkpointed at step 7"
    SUMMARY.write(tmp_path / "summary.json")
    assert closing(Outcome("finished", 3, 0), tmp_path) == summary.render(SUMMARY)
    assert closing(Outcome("stopped", 3, 0), tmp_path).startswith("stopped at step 3 as asked\nrun runs/x")
    assert closing(Outcome("finished", 3, 0), tmp_path, report=True).splitlines()[-1].startswith("report: none, as it")


@pytest.mark.processes
def test_an_error_of_the_configuration_is_in_the_log_and_is_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dtrain.train.worker", "/nowhere/config.yaml"],
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.returncode == 2 and "dtrain: error: cannot read the configuration /nowhere" in done.stderr


@pytest.mark.parametrize(("hang_seconds", "minutes"), [("", 30.0), ("0", 30.0), ("60", 30.0), ("10800", 180.5)])
def test_groups_wait_at_least_as_long_as_a_hang_is_waited_for(
    hang_seconds: str, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HANG_SECONDS, hang_seconds or "0")
    assert patience("gloo") == timedelta(minutes=minutes)
