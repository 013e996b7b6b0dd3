"""Every example runs, learns, and sends what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.comm.runtime.membership.members import serve

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"plain_ddp": 2, "diloco_fsdp2": 4, "hsdp_fsdp2": 4, "deepspeed_zero": 4, "accelerate_loop": 2}


RESUMES, MEET, ONE_BYTE = "save_and_resume", "come_and_go", "one_byte_members"
NOTEBOOK, LORA = "notebook", "lora"
ELSEWHERE = {"hf_trainer", "hf_lora", "lightning_trainer", "fabric_loop"}
"""In tests/integrations."""


def torchrun(workers: int, name: str, *arguments: str) -> str:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command = [*run, f"examples/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_are_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {
        *EXAMPLES, *ELSEWHERE, RESUMES, MEET, ONE_BYTE, NOTEBOOK, LORA,
    }  # fmt: skip


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_and_learns(name: str) -> None:
    said = torchrun(EXAMPLES[name], name)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", said)]
    assert losses[-1] < 0.2 * losses[0]
    assert "0 skipped, sent" in said

    digests = re.findall(r"weights (\w{16})", said)
    assert len(set(digests)) <= 1 and len(digests) == (2 if name == "hsdp_fsdp2" else 0)


def test_native_hsdp_takes_at_most_five_lines() -> None:
    """More than without dtrain, where `optimizer.step()` and `optimizer.zero_grad()` stand."""
    lines = (ROOT / "examples" / "hsdp_fsdp2.py").read_text().split('"""', 2)[2].splitlines()
    ours = [line for line in lines if re.search(r"\b(dtrain|sync|method)\b", line) and "digest" not in line]
    assert len(ours) - 2 <= 5, ours


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_going_on_within_a_round_is_never_having_stopped(tmp_path: Path) -> None:
    torchrun(2, RESUMES, str(tmp_path / "twice"), "27")
    again = torchrun(2, RESUMES, str(tmp_path / "twice"), "50")
    assert again == torchrun(2, RESUMES, str(tmp_path / "once"), "50")


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_replicas_that_are_runs_of_their_own_meet_and_learn() -> None:
    said = three_members(MEET)
    assert {slot for text in said for slot in re.findall(r"replica (\d) of 3", text)} == {"0", "1", "2"}
    for text in said:
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
        assert losses[-1] < 0.2 * losses[0]


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_machines_that_tell_a_byte_end_with_the_same_weights(tmp_path: Path) -> None:
    said = three_members(ONE_BYTE, str(tmp_path), "400")
    assert len({digest for text in said for digest in re.findall(r"with the weights (\w{16})", text)}) == 1
    for text in said:
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
        assert losses[-1] < 0.2 * losses[0]
        assert "its log of 400 steps reproduces them" in text


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_cells_of_a_notebook_run_in_one_process_and_in_several(workers: int, tmp_path: Path) -> None:
    said = torchrun(2, NOTEBOOK, str(tmp_path)) if workers == 2 else ran(NOTEBOOK, str(tmp_path))
    losses = [float(loss) for loss in re.findall(r"step \d+/200  loss (\S+)", said)]
    assert losses[-1] < 0.5 * losses[0] and "finished at step 200" in said and "loaded True" in said


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_adapters_are_trained_measured_continued_and_exported() -> None:
    pytest.importorskip("peft")
    said = ran(LORA)
    first, last = map(float, re.findall(r"validation loss (\S+) to (\S+)", said)[0])
    assert last < first and "bits per byte" in said and "adapter_model.safetensors" in said


def ran(name: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    return done.stdout


def three_members(name: str, *arguments: str) -> list[str]:
    store = serve(0)
    command = [sys.executable, f"examples/{name}.py", f"localhost:{store.port}", *arguments]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    return said
