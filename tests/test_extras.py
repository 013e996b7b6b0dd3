"""Without extras the one that is missing is said, before anything starts; an extra is enough for its verbs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dtrain.extras import EXTRAS

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"mlflow-skinny": "mlflow", "hydra-core": "hydra", "pyyaml": "yaml"}
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from dtrain.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def extras() -> dict[str, set[str]]:
    """Extra -> the modules that it brings."""
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: [re.split(r"[>=<\[]", need)[0] for need in needs] for extra, needs in optional.items()}
    return {extra: {MODULES.get(name, name) for name in needs} for extra, needs in names.items()}


def run(words: list[str], absent: set[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(sorted(absent)), *words], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "1", "XDG_STATE_HOME": str(folder / "state")},
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["train"], ["train", "-m", "train.seed=1,2"], ["launch", "--", "true"], ["bench", "collectives"],
        ["bench", "hooks"], ["doctor"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_missing_extra_is_named(words: list[str], tmp_path: Path) -> None:
    ended = run(words, set(EXTRAS), tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "dtrain: error: this needs hydra, which is not installed: pip install 'dtrain[train]'\n"


def test_training_asks_for_all_that_its_ranks_import(tmp_path: Path) -> None:
    ended = run(["train", "run.dir=x"], {"tensorboard"}, tmp_path)
    assert ended.returncode == 2 and "needs tensorboard" in ended.stderr and not (tmp_path / "x").exists()


def test_what_needs_no_extra_works_without(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text("some text " * 200)
    for words in (["data", "tokenize", "source=text", "out=tokens"], ["jobs", "list"], ["--help"]):
        ended = run(words, set(EXTRAS), tmp_path)
        assert ended.returncode == 0, ended.stderr


def test_the_extra_for_slurm_is_enough_to_launch(tmp_path: Path) -> None:
    absent = set(EXTRAS) - extras()["slurm"]
    words = ["launch", "--dry-run", "launcher=slurm", "launcher.nodes=2", "launcher.workers=2", "--", "true"]
    ended = run(words, absent, tmp_path)
    assert ended.returncode == 0 and "#SBATCH" in ended.stdout, ended.stderr


def test_every_package_of_an_extra_is_known_by_it() -> None:
    for module, extra in EXTRAS.items():
        assert module in extras()[extra], (module, extra)
