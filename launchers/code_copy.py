"""A copy of the code that a job runs, taken when it is submitted, so that later edits do not change the job.

The job's working directory stays what it was, so relative paths to data mean the same; its modules and its script are
taken from the copy, which comes first on the module path. So that a program finds all its files there, the copy
has every name of the folder once:

    copied    what git knows or would add, up to 1 MiB; in packages everything up to 1 MiB, also what git ignores
              (generated files); whatever Python can import, up to 16 MiB (built modules)
    linked    all else, to where it is: larger files, data, ignored folders, what a link out of the folder points to
    left out  .git, __pycache__, the folders that the copy itself lies in, and what would be linked in a folder that
              holds more than 1,000 of it, unless that is a package
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CODE", "Snapshot"]

CODE = "DTRAIN_CODE"
"""Environment of the ranks: the folder within the copy that stands for the working directory."""

LARGEST_BYTES, LARGEST_MODULE, MOST_BYTES, MOST_FILES, MOST_LINKS = 1 << 20, 16 << 20, 64 << 20, 5000, 1000
IMPORTABLE = (".py", *importlib.machinery.EXTENSION_SUFFIXES)
LEFT_OUT = (".git", "__pycache__")
ENVIRONMENTS = ("pyvenv.cfg", "conda-meta")


@dataclass(frozen=True)
class Snapshot:
    """The code below ``root``, to be copied below ``code``. ``directory``: where the command was given."""

    root: Path
    directory: Path
    code: Path

    @classmethod
    def of(cls, directory: Path, code: Path) -> Snapshot:
        """Of the repository around ``directory``, or of ``directory`` alone."""
        around = (folder for folder in (directory, *directory.parents) if (folder / ".git").exists())
        return cls(next(around, directory), directory, code)

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
        """Take the copy. Raises ``ValueError`` if it would be too large; then there is no copy."""
        shutil.rmtree(self.code, ignore_errors=True)
        self.code.parent.mkdir(parents=True, exist_ok=True)
        self.code.mkdir(mode=0o700)  # files keep their modes, but no other user can reach them
        try:
            _Copying(self.root, self.code).folder(self.root, _tracked(self.root), package=False)
        except BaseException:
            shutil.rmtree(self.code, ignore_errors=True)
            raise


class _Copying:
    """One copy being taken. Counts what it copies, and refuses to copy too much."""

    def __init__(self, root: Path, code: Path) -> None:
        self.root, self.code = root, code
        self.bytes = self.files = 0

    def folder(self, folder: Path, tracked: frozenset[str] | None, *, package: bool) -> None:
        """Everything below a folder of ``root``.

        ``tracked``: the paths that git knows or would add, relative to ``root``, and the folders that they lie in; None
        without git. ``package``: whether it lies in one.
        """
        target = self.code / folder.relative_to(self.root)
        target.mkdir(exist_ok=True)
        target.chmod(target.stat().st_mode & ~0o022)  # modules are loaded from here: no other user may write to it
        package, links = package or (folder / "__init__.py").exists(), {}
        for entry in list(os.scandir(folder)):
            path, place = Path(entry.path), target / entry.name
            if self._left_out(path):
                continue
            if entry.is_symlink():
                links[place] = self._pointed_to(path)
            elif entry.is_dir():
                if not self._goes_into(path, tracked, package=package):
                    links[place] = str(path)
                    continue
                self.folder(path, self._tracked_in(path, tracked), package=package)
            elif self._copies(entry, tracked, package=package):
                self._copy(path, place)
            else:
                links[place] = str(path)
        if package or len(links) <= MOST_LINKS:
            for place, goal in links.items():
                place.symlink_to(goal)

    def _left_out(self, path: Path) -> bool:
        return path.name in LEFT_OUT or self.code.is_relative_to(path)

    def _goes_into(self, path: Path, tracked: frozenset[str] | None, *, package: bool) -> bool:
        """Whether a folder is created and not linked."""
        if any((path / mark).exists() for mark in ENVIRONMENTS) or not os.access(path, os.R_OK | os.X_OK):
            return False
        if package or (path / ".git").exists() or (path / "__init__.py").exists():
            return True
        if tracked is None:
            return not path.name.startswith(".") and _holds_code(path)
        return str(path.relative_to(self.root)) in tracked

    def _tracked_in(self, path: Path, tracked: frozenset[str] | None) -> frozenset[str] | None:
        """What is tracked below a folder, which may be a repository of its own: a submodule."""
        names = _tracked(path) if (path / ".git").exists() else None
        place = path.relative_to(self.root)
        return tracked if names is None else frozenset(str(place / name) for name in names)

    def _pointed_to(self, link: Path) -> str:
        """Where a link's copy points: the same, unless its target is not copied too."""
        says = os.readlink(link)
        goal = Path(os.path.normpath(link.parent / says))
        within = [folder for folder in (goal, *goal.parents) if folder != self.root and self.root in folder.parents]
        copied = goal.is_relative_to(self.root) and not any(self._left_out(folder) for folder in within)
        return says if copied else str(goal)

    def _copies(self, entry: os.DirEntry[str], tracked: frozenset[str] | None, *, package: bool) -> bool:
        if not entry.is_file() or not os.access(entry.path, os.R_OK):
            return False
        if entry.name.endswith(IMPORTABLE):
            return entry.stat().st_size <= LARGEST_MODULE
        known = tracked is not None and str(Path(entry.path).relative_to(self.root)) in tracked
        return (package or known) and entry.stat().st_size <= LARGEST_BYTES

    def _copy(self, path: Path, place: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            self.bytes += path.stat().st_size
            self.files += 1
            shutil.copy2(path, place)
        if self.bytes > MOST_BYTES or self.files > MOST_FILES:
            raise ValueError(
                f"{self.root} holds more code than fits a snapshot ({MOST_FILES} files, {MOST_BYTES >> 20} MiB): start "
                "from the folder of your code, or set launcher.snapshot=false"
            )


def _holds_code(folder: Path) -> bool:
    """Whether anything below can be imported; folders of runs, and what is hidden, are data."""
    for _, below, names in os.walk(folder):
        run = "job.json" in names or {"config.yaml", "environment.json"} <= {*names}
        if run or {*ENVIRONMENTS} & {*names, *below}:
            below.clear()
            continue
        below[:] = [name for name in below if not name.startswith(".") and name not in LEFT_OUT]
        if any(name.endswith(IMPORTABLE) for name in names):
            return True
    return False


def _tracked(root: Path) -> frozenset[str] | None:
    """What git knows or would add below ``root``, with its folders; None without an answer of git."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    # Names are bytes, in any encoding.
    names = {os.fsdecode(name).rstrip("/") for name in done.stdout.split(b"\0") if name}
    folders = {str(parent) for name in names for parent in Path(name).parents}
    return frozenset(names | folders)
