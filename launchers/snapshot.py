"""A copy of the code that a job runs, taken when it is submitted: what is edited afterwards does not change the job.

The job's working directory stays what it was, so relative paths to data mean the same; its modules and its script are
taken from the copy, which comes first on the module path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CODE", "Snapshot"]

CODE = "DTRAIN_CODE"
"""Environment of the ranks: the folder within the copy that stands for the working directory."""

LARGEST_BYTES, MOST_BYTES, MOST_FILES = 1 << 20, 64 << 20, 5000


@dataclass(frozen=True)
class Snapshot:
    """The code below ``root``, as it will be below ``code``. ``directory``: where the command was given."""

    root: Path
    directory: Path
    code: Path

    @classmethod
    def of(cls, directory: Path, code: Path) -> Snapshot:
        """Of the git repository around ``directory``, or of ``directory`` alone."""
        told = _git(directory, "rev-parse", "--show-toplevel")
        return cls(Path(told[0]) if told else directory, directory, code)

    @property
    def variables(self) -> dict[str, str]:
        """For the environment of the ranks."""
        here = self.code / self.directory.relative_to(self.root)
        paths = dict.fromkeys([str(here), str(self.code), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        return {CODE: str(here), "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

    def mapped(self, program: Sequence[str]) -> tuple[str, ...]:
        """The program with its script taken from the copy."""
        words = list(program)
        for index, word in enumerate(words):
            path = self.directory / word
            if word.endswith(".py") and path.is_file() and path.resolve().is_relative_to(self.root):
                words[index] = str(self.code / path.resolve().relative_to(self.root))
                break
        return tuple(words)

    def take(self) -> None:
        """Copy. Raises ``ValueError`` for more than a repository of code has."""
        shutil.rmtree(self.code, ignore_errors=True)
        self.code.parent.mkdir(parents=True, exist_ok=True)
        self.code.mkdir(mode=0o700)  # files keep their modes, but nobody else gets to them
        total = 0
        for count, path in enumerate(self._files()):
            size = 0 if path.is_symlink() else path.stat().st_size
            total += size
            if total > MOST_BYTES or count >= MOST_FILES:
                raise ValueError(
                    f"{self.root} holds more code than fits a snapshot ({MOST_FILES} files, {MOST_BYTES >> 20} MiB): "
                    "start from the folder of your code, or set launcher.snapshot=false"
                )
            target = self.code / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                target.symlink_to(os.readlink(path))
            else:
                shutil.copy2(path, target)
        for folder, _, _ in os.walk(self.code):  # modules are loaded from here: nobody else writes to it
            os.chmod(folder, os.stat(folder).st_mode & ~0o022)

    def _files(self) -> Iterator[Path]:
        """What git knows or would add; without git the Python files. Large files are data, and no code."""
        listed = _git(self.root, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
        if listed:
            found: Iterator[Path] = (self.root / name for name in "\n".join(listed).split("\0") if name)
        else:
            found = _python_files(self.root, besides=self.code.parent)
        for path in found:
            if path.is_symlink() or (path.is_file() and path.stat().st_size <= LARGEST_BYTES):
                yield path


def _python_files(root: Path, *, besides: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        # Hidden folders, environments and the folders of runs hold no code of the job's.
        below[:] = [
            name for name in below
            if not name.startswith(".") and name != "__pycache__" and Path(folder) / name != besides
            and not any((Path(folder) / name / mark).exists() for mark in ("pyvenv.cfg", "job.json", "config.yaml"))
        ]  # fmt: skip
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _git(directory: Path, *words: str) -> list[str]:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *words], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
