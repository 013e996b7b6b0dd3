"""The command as people use it: killed, interrupted, stopped, resumed, and told what went wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.laws.jobs import SMALL

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

STEPS = 80
# Two workers: what four do differently is the laws' business, and they take twice as long to start.
RUN = [
    *SMALL, f"train.steps={STEPS}", "train.checkpoint_every_steps=10", "launcher.grace_seconds=40",
    "mesh.replicate=2", "mesh.shard=1", "launcher.workers=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        (folder / f"{number}.txt").write_text("\n".join(f"{i * number} green bottles" for i in range(300)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The summary of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = Command(folder, text, "run.report=true")
    assert done.wait(200) == 0, done.output()
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert f"report: {folder / 'report.html' if drawn else 'none, as it needs matplotlib'}" in done.output()
    assert not drawn or "Sent by whom" in (folder / "report.html").read_text()
    return summary(folder)


class Command:
    """``dtrain train`` in a process of its own, what it prints in a file."""

    def __init__(self, folder: Path, text: Path, *overrides: str) -> None:
        self.folder, self.printed = folder, folder / "printed.txt"
        arguments = [f"run.dir={folder}", f"data.path={text}", *RUN, "sync.every_steps=10", *overrides]
        with self.printed.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dtrain", "train", *arguments],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def output(self) -> str:
        return self.printed.read_text()

    def wait_for_step(self, step: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        while self.process.poll() is None:
            if metrics.exists() and any(f'"step": {n},' in metrics.read_text() for n in range(step, STEPS)):
                return
            time.sleep(0.02)
        raise AssertionError(f"the run ended before step {step}:\n{self.output()}")

    def workers(self) -> list[int]:
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "dtrain.train.worker" in child.cmdline()]


def summary(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return found


def test_kill_9_of_a_worker_leaves_no_trace(text: Path, tmp_path: Path, undisturbed: dict[str, object]) -> None:
    process = Command(tmp_path, text)
    process.wait_for_step(25)
    workers = process.workers()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(200) == 0, process.output()
    assert "SIGKILL" in process.output()
    assert summary(tmp_path)["parameters_digest"] == undisturbed["parameters_digest"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, STEPS + 1))  # rows past the checkpoint were cut and written again
    assert "attempt 2" in (tmp_path / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_checkpoints_and_the_same_command_goes_on(
    text: Path, tmp_path: Path, undisturbed: dict[str, object], number: signal.Signals, code: int
) -> None:
    process = Command(tmp_path, text)
    process.wait_for_step(13)
    process.process.send_signal(number)
    assert process.wait(100) == code, process.output()
    said = process.output()
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["reason"] == "signal"
    assert outcome["signal"] == number
    assert f"checkpointed at step {outcome['step']}" in said
    assert (tmp_path / "checkpoints" / f"step-{outcome['step']:010d}").is_dir()
    if number == signal.SIGINT:
        return  # one of the two shows how it goes on
    again = Command(tmp_path, text)
    assert again.wait(200) == 0, again.output()
    assert summary(tmp_path)["parameters_digest"] == undisturbed["parameters_digest"]


def test_a_second_ctrl_c_ends_at_once_and_leaves_nobody_behind(text: Path, tmp_path: Path) -> None:
    # Nobody agrees on anything before the end, so one Ctrl-C alone would wait for it.
    never = ["train.agree_every_steps=1000000", "train.log_every_steps=1000000", "train.steps=1000000"]
    process = Command(tmp_path, text, *never, "train.checkpoint_every_steps=100000")
    while len(workers := process.workers()) < 2 or not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.process.send_signal(signal.SIGINT)
    while "stopping: " not in process.output():
        time.sleep(0.05)
    time.sleep(0.6)
    process.process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130, process.output()
    assert "Ctrl-C again ends at once (there is no checkpoint yet)" in process.output()
    assert "ended at once; there is no checkpoint, so the same command starts from step 0:" in process.output()
    psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=10)
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_stop_after_damage_and_a_finished_run(text: Path, tmp_path: Path, undisturbed: dict[str, object]) -> None:
    first = Command(tmp_path, text, "train.stop_after_steps=35")
    assert first.wait(200) == 0, first.output()
    assert "stopped at step 35 as asked" in first.output()
    damaged = tmp_path / "checkpoints" / "step-0000000035" / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 255
    damaged.write_bytes(content)
    second = Command(tmp_path, text)
    assert second.wait(200) == 0, second.output()
    assert list((tmp_path / "checkpoints").glob("step-0000000035.corrupt-*"))
    assert "corrupt" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert f"step 30: DAMAGED CHECKPOINT {damaged.parent}" in second.output()
    assert summary(tmp_path)["parameters_digest"] == undisturbed["parameters_digest"]
    third = Command(tmp_path, text, "mesh.replicate=1", "mesh.shard=2")
    assert third.wait(100) == 0, third.output()
    assert f"already finished: {tmp_path}, step {STEPS} of {STEPS}" in third.output()
    assert summary(tmp_path)["parameters_digest"] == undisturbed["parameters_digest"]
    assert summary(tmp_path)["loss"] == undisturbed["loss"]


def test_the_cause_of_a_failure_comes_first(text: Path, tmp_path: Path) -> None:
    model = ["model._target_=tests.system.test_train_command.FailsOnRank1"]
    removed = ["~model.dim", "~model.layers", "~model.heads", "~model.tied_embeddings"]
    folders = [f"run.dir={tmp_path}", f"data.path={text}"]
    arguments = [argument for argument in RUN if not argument.startswith("model.")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dtrain", "train", *folders, *arguments, *model, *removed],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2  # nobody has taken a step: it would happen again
    first = next(line for line in errors.splitlines() if line.strip())
    assert "rank 1" in first
    assert "the cat sat on the cable" in first
    assert "the batch has input: Tensor[4, 32] of int64" in first and "test_train_command.py" in errors
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "attempt 1" in log and "attempt 2" not in log and 'raise RuntimeError("the cat sat on the cable")' in log


def __getattr__(name: str) -> object:
    """`FailsOnRank1`, defined late: the test process itself need not import torch."""
    if name != "FailsOnRank1":
        raise AttributeError(name)
    import torch
    import torch.distributed as dist

    class FailsOnRank1(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 4))

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if dist.get_rank() == 1:
                raise RuntimeError("the cat sat on the cable")
            return self.weight.square().sum()

    return FailsOnRank1
