"""What users of other launchers suffer from, by its number in the list of 25 pains that dtrain's launchers are held to.

Pains 1, 3, 13, 15, 19 and 21 have their tests on a real cluster (tests/system), 12 in test_local.py, 2 and 20 also in
test_slurm_fake.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.cli.main import main
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.launchers.slurm.script import render
from tests.fakes.fake_slurm import FakeSlurm
from tests.launchers.test_slurm_script import CASES, PYTHON, work
from tests.launchers.test_why import ended, told

LOGIN = "10.9.9.9"  # what Slurm calls the launch node


def script(**how: object) -> str:
    return render(work(), SlurmLauncher(python=PYTHON, **how))  # type: ignore[arg-type]  # names of its fields


def steps(text: str) -> list[list[str]]:
    """The words of every srun in a script, as bash hands them on."""
    found = [match[1] for line in commands(text) if (match := re.match(r"\s*(?:\w+=\S+\s+)*(srun .*)&$", line))]
    assert found
    return [shlex.split(step) for step in found]


def commands(text: str) -> list[str]:
    """A script's lines, those that go on in the next one as one."""
    return text.replace("\\\n", " ").splitlines()


def agent(text: str) -> str:
    """What one node runs under launcher.per_node=torchrun."""
    (step,) = steps(text)
    return step[-1]


TORCHRUN = script(nodes=2, workers=8, per_node="torchrun")
everywhere = pytest.mark.parametrize("text", [render(*case) for case in CASES.values()], ids=list(CASES))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DTRAIN_CLUSTER", "fake")
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", LOGIN)
    monkeypatch.chdir(tmp_path)
    with FakeSlurm(nodes=2) as fake:
        yield fake


def launcher() -> SlurmLauncher:
    return SlurmLauncher(nodes=2, workers=2, max_restarts=0, snapshot=False)


def test_pain_2_who_hosts_the_meeting_does_not_depend_on_names() -> None:
    assert "--rdzv-backend=static" in agent(TORCHRUN) and "c10d" not in TORCHRUN
    assert '--node-rank="$SLURM_NODEID"' in agent(TORCHRUN) and '--master-addr="$MASTER_ADDR"' in agent(TORCHRUN)


@pytest.mark.processes
def test_pain_4_without_scontrol_a_job_ends_and_never_falls_back_to_this_host(slurm: FakeSlurm, tmp_path: Path) -> None:
    (slurm.folder / "bin" / "scontrol").unlink()
    job = launcher().submit(["python", "-c", "print('ran')"], folder=tmp_path / "job")
    end = tmp_path / "job" / "end.json"
    deadline = time.monotonic() + 30
    while not end.exists():
        assert time.monotonic() < deadline, (job.folder / "logs" / "batch.log").read_text()
        time.sleep(0.05)
    assert json.loads(end.read_text())["reason"] == "scontrol cannot name the nodes of the job"
    assert json.loads(end.read_text())["code"] == 2 and not list((tmp_path / "job" / "logs").glob("rank-*.log"))


@pytest.mark.processes
def test_pains_5_6_and_14_every_rank_has_its_own_place_and_log_and_none_meets_at_the_login_node(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(
        "import os\nprint(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'GROUP_RANK', 'MASTER_ADDR')))\n"
    )
    assert launcher().submit(["python", "program.py"], folder=tmp_path / "job").wait(50) == "finished"
    for rank in range(2):
        head, said = (tmp_path / "job" / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert head.startswith(f"---- rank {rank} of 2 on ")
        assert said == f"{rank} 0 {rank} 127.0.0.1"


@everywhere
def test_pain_5_the_launch_node_is_never_where_ranks_meet(text: str) -> None:
    assert "SLURM_LAUNCH_NODE_IPADDR" not in text and "SLURM_SUBMIT_HOST" not in text


@everywhere
def test_pain_6_a_ranks_place_is_never_read_in_the_batch_script(text: str) -> None:
    ours = "\n".join(line for line in text.splitlines() if "torch.distributed.run" not in line)
    assert not re.search("SLURM_(NODEID|PROCID|LOCALID)", ours)
    for step in steps(text):
        if "torch.distributed.run" in step[-1]:
            assert '"$SLURM_NODEID"' in step[-1]  # still to be read, on the node


@everywhere
def test_pain_7_every_rank_is_started_by_srun_and_only_once(text: str) -> None:
    starting = [line for line in commands(text) if "dtrain.launchers.rank" in line]
    assert len(starting) == len(steps(text)) and all("srun " in line for line in starting)


def test_pain_7_torchrun_is_one_task_per_node() -> None:
    assert "#SBATCH --ntasks-per-node=1\n" in TORCHRUN and "--ntasks-per-node=1" in steps(TORCHRUN)[0]
    assert "--nnodes=2 --nproc-per-node=4" in agent(TORCHRUN)
    assert "torch.distributed.run" not in script(nodes=2, workers=8)


def test_pain_8_the_address_and_the_interface_of_a_faster_network_can_be_named() -> None:
    text = script(nodes=2, workers=2, address="juwels07i", interface="ib0")
    assert "\naddress=juwels07i\n" in text and "address=$head" not in text
    assert "export GLOO_SOCKET_IFNAME=ib0\n" in text and "export NCCL_SOCKET_IFNAME=ib0\n" in text


@everywhere
def test_pain_9_no_ssh_no_pdsh_and_no_hostfile(text: str) -> None:
    assert not re.search(r"\b(ssh|pdsh|hostfile)\b", text)


@everywhere
def test_pain_10_a_dead_task_ends_its_step_within_a_minute(text: str) -> None:
    assert all({"--kill-on-bad-exit=1", "--wait=60"} <= set(step) for step in steps(text))


def test_pain_11_torchrun_survives_the_schedulers_signals_and_restarts_nothing_itself() -> None:
    assert agent(TORCHRUN).startswith("trap '' TERM INT HUP USR1 USR2; exec ")
    assert "--max-restarts=0" in agent(TORCHRUN) and "--signals-to-handle=SIGQUIT" in agent(TORCHRUN)


def test_pain_14_equal_errors_of_many_ranks_are_told_once(tmp_path: Path) -> None:
    text = told(tmp_path, [ended(rank, message=f"ValueError: no example {rank}") for rank in range(64)], {})
    assert (
        text.count("ValueError") == 1 and "63 other ranks (1, 2, 3, 4, 5, 6, 7, 8, ...) failed in the same way" in text
    )


def test_pain_17_the_signal_can_be_turned_off_and_only_the_script_requeues() -> None:
    text = script(signal_seconds=90)
    assert "#SBATCH --signal=USR2@90\n" in text and "--signal" not in script(signal_seconds=0)
    assert "submitit" not in text and "requeue" not in " ".join(" ".join(step) for step in steps(text))


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_pain_18_scontrol_is_called_outside_of_the_container(runtime: str) -> None:
    text = script(nodes=2, workers=2, container="image.sqsh", container_runtime=runtime)
    within = " ".join(" ".join(step) for step in steps(text))
    assert "image.sqsh" in within and "scontrol" not in within
    assert text.count("image.sqsh") == len(steps(text)) and "scontrol requeue" in text


def adder(number: int) -> Callable[[], int]:
    """A function that no rank could import: it is in its pickle alone, with the number. It asks to be run once more."""

    def add() -> int:
        mark = Path(f"again-{os.environ['RANK']}")
        if not mark.exists():
            mark.touch()
            sys.exit(75)
        return number + int(os.environ["RANK"])

    return add


@pytest.mark.processes
def test_pain_22_a_function_that_is_run_again_is_the_one_that_was_submitted(slurm: FakeSlurm, tmp_path: Path) -> None:
    job = SlurmLauncher(nodes=2, workers=2, max_restarts=1, snapshot=False).submit(adder(40), folder=tmp_path / "job")
    assert job.result(50) == [40, 41]
    assert len((tmp_path / "job" / "attempts").read_text().splitlines()) == 2


def test_pain_23_ranks_get_one_frozen_configuration_and_compose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = ["launcher=slurm", "launcher.nodes=2", "launcher.workers=2", "mesh.replicate=2", "mesh.shard=1"]
    assert main(["train", "--dry-run", *wanted, "run.dir=run", "train.steps=17"]) == 0
    ((*_, module, config),) = steps(capsys.readouterr().out)
    assert (module, config) == ("dtrain.train.worker", str(tmp_path / "run" / "config.yaml"))
    assert not (tmp_path / "run").exists()
