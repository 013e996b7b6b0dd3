"""The page on planned memory, one of its cases against torch's tracker, and the table of losses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.plan_losses import losses
from benchmarks.plan_memory import ENGINES, MODELS, Grown, Tracked, plan_memory_report, tracked_cases
from tests.programs.hosts import ROOT, environment


def test_the_table_is_made_of_the_page() -> None:
    page = {
        "made": {"revision": "abc"},
        "figures": {
            "dense, AdamW": {"validation_losses": [3.0, 2.0]}, "co2, AdamW": {"validation_losses": [3.0, 2.1]},
            "co2, Muon": {"validation_losses": [9.0]}, "lost, AdamW": {"validation_losses": [None]},
        },
    }  # fmt: skip
    assert losses(page) == {"source": "docs/evidence/all_syncs.json", "revision": "abc", "rows": {"co2": 0.05}}


def test_every_model_is_tracked_under_every_engine() -> None:
    assert {(model, engine) for model, engine, *_ in tracked_cases()} == {(m, e) for m in MODELS for e in ENGINES}
    assert (len(MODELS), len(ENGINES)) == (3, 5)


def test_the_page_holds_the_worst_case_to_the_line() -> None:
    near = Tracked("a", "ddp", "fp32", "plain", 1000, 1001)
    far = Tracked("a", "fsdp", "fp32", "plain", 1040, 1000)
    one = Grown("a", "ddp", "2x1", "dense", 100, "backward", 105)
    assert [check.met for check in plan_memory_report([near], [one], one).checks] == [True, True]
    report = plan_memory_report([near, far], [one], one)
    assert [check.met for check in report.checks] == [False, True]
    assert "+4.00%" in report.body


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_torchs_tracker_counts_what_is_planned(engine: str) -> None:
    words = [sys.executable, "-m", "benchmarks.plan_memory", "tracked", "convolutions", engine, "bf16", "plain", "2"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=300)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["planned"] == pytest.approx(row["tracked"], rel=0.03)
