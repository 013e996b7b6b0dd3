"""The examples of the Hugging Face integration run, learn, and are at most five lines longer than without dtrain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ("hf_trainer", "hf_lora")


@pytest.mark.parametrize("name", EXAMPLES)
def test_at_most_five_lines_are_dtrains(name: str) -> None:
    """Those that name what is imported from dtrain; without them the program is whole."""
    text = (ROOT / "examples" / f"{name}.py").read_text()
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dtrain")]
    names = {alias.name for node in imports for alias in node.names}
    lines = {number for node in imports for number in range(node.lineno, (node.end_lineno or 0) + 1)}
    for statement in tree.body:
        if names & {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}:
            assert isinstance(statement, ast.Expr)  # it gives nothing that another statement uses
            lines.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    assert 0 < len(lines) <= 5


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_learns_and_tells_its_bytes(name: str, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*run, f"examples/{name}.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    losses, evaluated = (
        [float(loss) for loss in re.findall(rf"'{label}': '(\S+)'", done.stdout)] for label in ("loss", "eval_loss")
    )
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    assert len(evaluated) == 3 and max(evaluated) < 4.5  # a byte drawn evenly has log(256), 5.5
    assert re.findall(r"'dtrain_sent_bytes': (\d+), 'dtrain_skipped_steps': 0", done.stdout)
    assert (tmp_path / "checkpoint-60" / "dtrain" / "replica-1-of-2.shard-0-of-1.safetensors").exists()
