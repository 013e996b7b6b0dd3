"""What the README and the docs say can be done, can be done."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain import every_step
from dtrain.cli.main import main
from dtrain.comm.seeds import Key
from dtrain.launchers import registry
from dtrain.testing import check_compressor
from dtrain.train.config import compose

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "slurm").rglob("*.md")])]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_example_is_the_examples_file() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = [line[1:] for line in diff.splitlines() if line[:1] in ("+", " ")]
    example = iter((ROOT / "examples" / "plain_ddp.py").read_text().splitlines())
    assert len(lines) == 7
    for line in lines:  # in this order
        assert any(text.startswith(line) for text in example), line


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ci_runs_what_the_readme_names() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make check", "make test", "make test-cluster"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("line", re.findall(r"\.venv/bin/(dtrain train .*)", README))
def test_every_command_composes(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text("text " * 2000)
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Model(torch.nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
        "class Data:\n    tokens_per_example, vocab_size = 4, 256\n"
        "    def __init__(self, split, path):\n        pass\n    def __len__(self):\n        return 100\n"
        "    def __getitem__(self, i):\n        return {name: torch.zeros(4).long() for name in ('input', 'target')}\n"
        "    def describe(self):\n        return {'name': 'mine'}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if "run.resume" in line:
        assert main(["train", "--dry-run", *shlex.split(line)[2:]]) == 2  # there is no runs/x here
        assert "has no checkpoint" in capsys.readouterr().err
        return
    arguments = [word.replace("FOLDER", str(folder)) for word in shlex.split(line)[2:] if word != "--dry-run"]
    code = main(["train", "--dry-run", *arguments])
    sys.modules.pop("mine", None)  # or later tests would find it
    assert code == 0, capsys.readouterr().err


def test_the_compressor_of_the_docs_is_one() -> None:
    (block,) = code_blocks((ROOT / "docs" / "concepts.md").read_text())
    space: dict[str, Any] = {}
    exec(block, space)
    halves = space["Halves"]()
    rows = torch.tensor([[0.5, -3.0, 1.2]])
    check_compressor(halves)
    assert halves.decode(halves.encode(rows, Key(0, 0)), 3, Key(0, 0)).tolist() == [[0.5, -3.0, 1.0]]
    assert every_step(compress=halves).plan.compressions[0].compressor is halves


def test_the_defaults_in_the_table_of_local_updates_are_the_functions() -> None:
    page = (ROOT / "docs" / "local_updates" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", page[page.index("| function | defaults") :], re.MULTILINE)
    assert rows
    for name, told in rows:
        found = inspect.signature(getattr(dtrain, name)).parameters
        for argument, value in re.findall(r"`(\w+)=([^`]*)`", told):
            assert found[argument].default == ast.literal_eval(value), (name, argument)


@pytest.mark.parametrize(
    "word", re.findall(r"`(\S*launcher\.\w+=\[.*?\]'?)`", (ROOT / "slurm" / "README.md").read_text())
)
def test_the_lists_in_the_page_about_slurm_arrive_as_they_are_printed(word: str) -> None:
    (given,) = shlex.split(word)
    key, _, value = given.partition("=")
    name = key.partition(".")[2]
    launcher = next(iter(registry.keys()[name].launchers))  # one that takes it
    arrived = getattr(compose(["run.dir=x", f"launcher={launcher}", given]).launcher, name)
    assert list(arrived) == ast.literal_eval(value if '"' in value else re.sub(r"[\w:]+", r"'\g<0>'", value))
