"""Folders from which code is loaded: pickled functions, command lines, configurations, copies of code.

Whoever can write there runs code as the user. So such a folder, and each file in it that is loaded, must belong to the
user (or to root) and be writable by nobody else; it is checked when the folder is chosen, and again before anything is
loaded. Where owners and modes mean nothing (a bind mount, a file system without them), DTRAIN_TRUSTED_FOLDERS names
folders, separated by colons, below which nothing is checked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["TRUSTED", "Untrusted", "make_folder", "opened", "require_own", "write_private"]

TRUSTED = "DTRAIN_TRUSTED_FOLDERS"
WAY_OUT = "(chmod go-w, chown), or choose another folder of your own"


class Untrusted(ValueError):
    """Another user may have written what was to be loaded."""


def require_own(path: Path) -> None:
    """Raise ``Untrusted`` where another user can write to a file or folder, ``FileNotFoundError`` if it is missing."""
    path = path.resolve(strict=True)
    _require(path, path.stat())


def opened(path: Path) -> BinaryIO:
    """A file to load code from, whose folder is the user's own too. Raises as `require_own`, and ``OSError``.

    The file is opened before it is checked, in a folder that is held open, so that no other can be swapped in.
    """
    folder = os.open(path.parent.resolve(strict=True), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _require(path.parent, os.fstat(folder))
        descriptor = os.open(path.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
    file = os.fdopen(descriptor, "rb")
    try:
        _require(path, os.fstat(descriptor))
    except BaseException:
        file.close()
        raise
    return file


def make_folder(path: Path) -> None:
    """Make a folder that no other user can write to, whatever the umask, unless it exists.

    Raises ``Untrusted`` where it exists and another user can write to it, and ``OSError``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o755, exist_ok=True)
    require_own(path)


def write_private(path: Path, content: bytes) -> None:
    """Write, or replace, a file that only its owner can read. Raises ``OSError``."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _require(path: Path, about: os.stat_result) -> None:
    reasons = []
    if about.st_uid not in (os.geteuid(), 0):
        reasons.append(f"it belongs to user {about.st_uid}, and you are {os.geteuid()}")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everybody" if about.st_mode & stat.S_IWOTH else f"group {about.st_gid}"
        reasons.append(f"{who} can write to it (mode {stat.S_IMODE(about.st_mode):04o})")
    if not (stat.S_ISDIR(about.st_mode) or stat.S_ISREG(about.st_mode)):
        reasons.append("it is neither a file nor a folder")
    if reasons and not _named(path):
        raise Untrusted(
            f"code would be loaded from {path}, but {' and '.join(reasons)}: whoever does could run anything as you; "
            f"take it for yourself {WAY_OUT}. {TRUSTED} names folders where owners and modes mean nothing"
        )


def _named(path: Path) -> bool:
    named = [Path(name).resolve() for name in os.environ.get(TRUSTED, "").split(os.pathsep) if name]
    return any(path.resolve().is_relative_to(folder) for folder in named)
