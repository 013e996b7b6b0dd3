"""The report on one card: its code runs, and without a card it neither measures nor passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.harness import Session
from tests.gpu import card
from tests.programs.hosts import ROOT

NCCL = {"why_not": "", "ms": {"1": 1.5}}


def test_its_page_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_COMPILE", "never")
    for name, value in {"WARM_UP": 1, "EXAMPLES": 2, "LENGTH": 16}.items():
        monkeypatch.setattr(gpu, name, value)
    coders = gpu._coders()
    monkeypatch.setattr(
        gpu, "_coders", lambda: {name: coders[name] for name in ("bf16", "top-k, 1 %")} | {"int8": coders["bf16"]}
    )
    figures = gpu.measure("cpu", elements=1 << 12, repeats=1)
    report = gpu.gpu_report(figures | {"nccl": NCCL})
    assert all(check.met for check in report.checks)
    assert all(f"| {name} |" in report.body for name in ("bf16", "top-k, 1 %", "int8", "fp32", "DDP's own"))
    assert "| 1 | 1.5 |" in report.body
    none = gpu.gpu_report(figures | {"nccl": {"why_not": "It does not work here: NCCL says so", "ms": {}}})
    assert none.body.endswith("It does not work here: NCCL says so")


def test_figures_of_other_code_are_no_page(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    row = {"bytes": 1, "wrong_decoded": 0, "wrong_compiled": 0, **dict.fromkeys(gpu.TIMES, 1.0)}
    figures = {
        "about": dict.fromkeys(("card", "torch", "cuda", "nccl", "python"), "x"), "code": gpu.code(), "elements": 1,
        "copy_ms": 1.0, "coders": {"int8": row}, "steps": {}, "nccl": NCCL,
    }  # fmt: skip
    path.write_text(json.dumps(figures) + "\n")
    assert gpu.measured_elsewhere(path).figures == figures
    path.write_text(json.dumps({**figures, "code": "0"}))
    with pytest.raises(RuntimeError, match="other code than what is checked out"):
        gpu.measured_elsewhere(path)


@pytest.mark.skipif(not card.why_not(), reason="there is a card")
@pytest.mark.parametrize("module", ["benchmarks.gpu", "tests.gpu.card"])
def test_without_a_card_it_says_so_and_does_not_pass(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == card.NO_CARD and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "nothing was tested on a GPU" in done.stderr


@pytest.mark.skipif(not card.why_not(), reason="there is a card")
def test_the_report_is_missed_without_a_card(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 77"):
        gpu.gpu(Session(tmp_path, tmp_path))


@pytest.mark.skipif(not card.why_not(), reason="there is a card")
def test_tests_that_were_asked_for_do_not_pass_without_a_card() -> None:
    """By their mark, and by a file's name; both in one start of python."""
    program = (
        "import pytest\n"
        "for words in (['-m', 'gpu', 'tests/gpu'], ['tests/gpu/test_numbers.py']):\n"
        "    print('CODE', int(pytest.main(['-q', '-p', 'no:cacheprovider', *words])))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert said.count(f"CODE {card.NO_CARD}\n") == 2 and said.count("nothing was tested on a GPU") >= 2, said
