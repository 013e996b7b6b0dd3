"""Every example runs, learns, and sends what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"plain_ddp": 2, "diloco_fsdp2": 4, "deepspeed_zero": 4}


def test_all_are_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_and_learns(name: str) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={EXAMPLES[name]}"]
    done = subprocess.run([*run, f"examples/{name}.py"], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", done.stdout)]
    assert losses[-1] < 0.2 * losses[0]
    assert "0 skipped, sent" in done.stdout
