"""A copy of the code in which a program finds all that it finds in place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.launchers.code_copy import Snapshot

PROGRAM = """
import os, sys
from pathlib import Path
import mypkg, mypkg._version, generated.thing, lonely
from mypkg.generated import words
from third_party.sub.foo import X
here = Path(__file__).parent
assert (Path(mypkg.__file__).parent / "defaults.yaml").read_text() == "a: 1"
assert len((Path(mypkg.__file__).parent / "table.bin").read_bytes()) == 2 << 20
assert (here / "ext" / "outside.txt").read_text() == "outside"
assert (here / "inside.txt").read_text() == "a: 1"
assert (here / "data" / "x.txt").read_text() == "data"
print(X, words.W, lonely.V, str(here))
"""


def git(folder: Path, *words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=me", "-c", "user.email=me@x", "-c", "protocol.file.allow=always", *words],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


def write(path: Path, text: str | bytes = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository with all that a copy by git's list alone would lack."""
    source, other = tmp_path / "source", tmp_path / "other"
    write(other / "foo.py", "X = 'submodule'")
    git(other, "init", "-q")
    git(other, "add", ".")
    git(other, "commit", "-qm", "x")
    write(tmp_path / "outside" / "ext" / "outside.txt", "outside")
    write(source / "t.py", PROGRAM)
    write(source / ".gitignore", "_version.py\ngenerated/\ndata/\nlonely.py\nruns/\n*.so\n")
    for name in ("mypkg/__init__.py", "mypkg/_version.py", "third_party/__init__.py", "generated/thing.py"):
        write(source / name)
    write(source / "mypkg" / "generated" / "words.py", "W = 'generated'")
    write(source / "lonely.py", "V = 'ignored'")
    write(source / "mypkg" / "defaults.yaml", "a: 1")
    write(source / "mypkg" / "table.bin", bytes(2 << 20))
    write(source / "mypkg" / "built.so", bytes(2 << 20))
    write(source / "data" / "x.txt", "data")
    write(source / "runs" / "old" / "code" / "t.py", "raise SystemExit('an old copy')")
    (source / "ext").symlink_to("../outside/ext")
    (source / "inside.txt").symlink_to("mypkg/defaults.yaml")
    (source / "latest").symlink_to("runs/old")
    write(Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.txt")), "not UTF-8")
    git(source, "init", "-q")
    git(source, "submodule", "add", str(other), "third_party/sub")
    git(source, "add", ".")
    git(source, "commit", "-qm", "x")
    return source


def with_git(source: Path) -> None:
    """As it is."""


def without_git(source: Path) -> None:
    subprocess.run(["rm", "-rf", ".git", "third_party/sub/.git"], cwd=source, check=True)


def of_another_owner(source: Path) -> None:
    """Then git refuses: "dubious ownership"."""
    subprocess.run(["chown", "-R", "nobody", str(source)], check=True)


@pytest.mark.processes
@pytest.mark.parametrize("how", [with_git, without_git, of_another_owner])
@pytest.mark.parametrize("below", [".", "mypkg"])
def test_a_program_that_runs_in_place_runs_from_its_copy(
    how: Callable[[Path], None], below: str, source: Path, tmp_path: Path
) -> None:
    if how is of_another_owner and os.geteuid():
        pytest.fail("needs root, to give files away")
    how(source)
    if below != "." and how is without_git:
        return  # then the folder of the command is all that there is
    snapshot = Snapshot.of(source / below, source / "runs" / "new" / "code")
    snapshot.take()
    program = snapshot.mapped(["python", str(source / "t.py")])
    assert program[1] == str(snapshot.code / "t.py")
    done = subprocess.run(
        [sys.executable, *program[1:]], cwd=tmp_path, env={**os.environ, **snapshot.variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == f"submodule generated ignored {snapshot.code}\n", done.stderr
    assert not (snapshot.code / "runs").exists()  # the copy is not copied, nor what lies beside it
    assert (snapshot.code / "latest" / "code" / "t.py").exists()


def test_code_is_copied_and_data_are_linked(source: Path) -> None:
    snapshot = Snapshot.of(source, source / "runs" / "new" / "code")
    snapshot.take()
    copied = ("t.py", "mypkg/_version.py", "mypkg/defaults.yaml", "mypkg/generated/words.py", "mypkg/built.so")
    linked = ("mypkg/table.bin", "data", "ext")
    assert not [name for name in (*copied, "third_party/sub/foo.py") if (snapshot.code / name).is_symlink()]
    assert all((snapshot.code / name).is_symlink() for name in linked)
    assert b"caf\xe9.txt" in os.listdir(os.fsencode(snapshot.code))


def test_too_much_code_is_refused_and_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.launchers.code_copy.MOST_FILES", 6)
    snapshot = Snapshot.of(source, source / "runs" / "new" / "code")
    with pytest.raises(ValueError, match=r"holds more code than fits a snapshot .*launcher\.snapshot=false"):
        snapshot.take()
    assert not snapshot.code.exists()


def test_a_folder_full_of_data_beside_a_script_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.launchers.code_copy.MOST_FILES", 6)
    monkeypatch.setattr("dtrain.launchers.code_copy.MOST_LINKS", 8)
    write(tmp_path / "work" / "t.py")
    for number in range(10):
        write(tmp_path / "work" / f"{number}.png")
    snapshot = Snapshot.of(tmp_path / "work", tmp_path / "run" / "code")
    snapshot.take()
    assert [path.name for path in snapshot.code.iterdir()] == ["t.py"]
