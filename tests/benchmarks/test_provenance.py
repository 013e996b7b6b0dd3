"""Which code a page tells of, and how far it has moved since."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import provenance
from benchmarks.provenance import EVIDENCE, MEASURES, ROOT, DirtyTree, commits_since, require_clean, revision, stale

LONG_RUNS = {"fuzz", "kill_and_resume"}
"""Commands of their own."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    commit(tmp_path, "comm/kernels.py", "first\n" * 20)
    return tmp_path


def commit(root: Path, name: str, text: str) -> str:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return committed(root)


def committed(root: Path) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    provenance.git(root, "add", "-A")
    provenance.git(root, *who, "commit", "-q", "-m", "x")
    return revision(root)


def test_commits_are_counted_that_touched_what_is_measured_wherever_it_stood(repository: Path) -> None:
    made = revision(repository)
    assert commits_since(made, ["comm/kernels.py"], repository) == 0
    commit(repository, "README.md", "x")
    commit(repository, "comm/kernels.py", "first\n" * 20 + "second\n")
    provenance.git(repository, "mv", "comm/kernels.py", "comm/compiled.py")
    committed(repository)
    commit(repository, "comm/compiled_too.py", "x")
    assert commits_since(made, ["comm/compiled.py"], repository) == 2
    assert commits_since(made, ["comm"], repository) == 3
    assert commits_since("0" * 40, ["comm"], repository) is None


def test_a_changed_tree_is_not_measured_but_for_the_pages_themselves(repository: Path) -> None:
    (repository / EVIDENCE).mkdir(parents=True)
    (repository / EVIDENCE / "slow.md").write_text("a page")
    require_clean(repository)
    (repository / "comm" / "kernels.py").write_text("changed")
    (repository / "new.py").write_text("new")
    with pytest.raises(DirtyTree, match=r"comm/kernels\.py, new\.py; commit them"):
        require_clean(repository)


def test_nothing_is_run_in_a_changed_tree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def changed() -> None:
        raise DirtyTree("not measured, as these have changes that are not committed: x.py")

    monkeypatch.setattr(command, "require_clean", changed)
    assert command.main(["quality"]) == 2
    assert "x.py" in capsys.readouterr().out


def test_what_is_stale_is_listed_with_the_oldest_first(repository: Path) -> None:
    pages, old = repository / EVIDENCE, revision(repository)
    pages.mkdir(parents=True)
    new = commit(repository, "comm/kernels.py", "second")
    for name, made, kept in (
        ("kernels", new, {}),
        ("loss", new, {old: 3}),
        ("slow", f"{old}, with changes that are not committed", {}),
        ("quality", "f" * 40, {}),
    ):
        content = {"made": {"revision": made}, "kept_runs": kept, "figures": {}}
        (pages / f"{name}.json").write_text(json.dumps(content))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in stale(pages, repository).splitlines()]
    counts = {row[0]: row[2] for row in rows[2:]}
    assert next(iter(counts)) == "quality" and [*counts][-1] == "kernels"
    assert counts == {"quality": "unknown", "loss": "1", "slow": "1", "kernels": "0"}
    assert {row[0]: row[3] for row in rows[2:]} == {
        "quality": "", "loss": f"3 runs at {old[:10]}", "slow": "with changes that are not committed", "kernels": "",
    }  # fmt: skip


def test_every_page_declares_what_it_measures() -> None:
    assert MEASURES.keys() == {*command.REPORTS, *LONG_RUNS}
    assert {path.stem for path in (ROOT / EVIDENCE).glob("*.json")} <= MEASURES.keys()
    assert [path for paths in MEASURES.values() for path in paths if not (ROOT / path).exists()] == []
