"""The names inside ``checkpoints/``, and operations on them that never lose the last good checkpoint.

step-0000001200/                    complete: it got this name by one rename, after everything in it was on disk
step-0000001200.tmp-<attempt>/      being written, or left by an attempt that died: never read
step-0000001200.replaced-<attempt>/ complete: moved aside while a rerun puts its own step 1200 in place
step-0000001200.deleting-<attempt>/ being deleted: never read
step-0000001200.corrupt-<n>/        damaged; kept for inspection
latest                              the name of the last commit, for people; never read here
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

LATEST = "latest"

_STEP = re.compile(r"step-(\d{10,})")
_MARKED = re.compile(r"(step-\d{10,})\.(tmp|replaced|deleting)-.+")


OWNERS = 0o644
"""The mode of a file that its owner alone can write to, whatever the umask."""


def step_name(step: int) -> str:
    """
    >>> step_name(1200)
    'step-0000001200'
    """
    return f"step-{step:010d}"


def step_of(path: Path) -> int | None:
    """The step of a committed folder's name, None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def step_folders(folder: Path) -> list[Path]:
    """The committed step folders, oldest step first; none if ``folder`` does not exist."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()), key=_by_step)


def had_checkpoints(folder: Path) -> bool:
    """Whether a checkpoint was ever committed here, whatever became of it since."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(".replaced-" in name for name in names):
        return False  # `recover` gives it its name back
    return any(name == LATEST or _STEP.fullmatch(name) or ".corrupt-" in name for name in names)


def marked(path: Path, mark: str, attempt: str) -> Path:
    """The name of ``path`` while it is "tmp", "replaced" or "deleting"; ``attempt`` is made fit for a file name."""
    return path.with_name(f"{path.name}.{mark}-{re.sub(r'[^A-Za-z0-9_-]', '_', attempt) or '0'}")


def recover(folder: Path) -> None:
    """Finish or undo what a dead attempt left behind. Only one process may call this, while none writes.

    A rerun that died between moving an old step aside and putting its own in place: the old one gets its name back.
    """
    if not folder.is_dir():
        return
    leftovers = [(match, path) for path in folder.iterdir() if (match := _MARKED.fullmatch(path.name))]
    for match, path in sorted(leftovers, key=lambda pair: pair[1].name):
        final = folder / match.group(1)
        if match.group(2) == "replaced" and not final.exists():
            path.rename(final)
            sync_folder(folder)
        else:
            discard(path)


def discard(path: Path) -> None:
    """Delete a folder. A crash half-way leaves it under a name that is never read."""
    match = _MARKED.fullmatch(path.name)
    if match is None or match.group(2) != "deleting":
        path = doom(path)
    # Not an error if something stays (NFS keeps files that a dying process has open): the next attempt deletes it.
    shutil.rmtree(path, ignore_errors=True)


def doom(path: Path) -> Path:
    """Rename a folder so that deleting it need not be atomic; returns its new path."""
    n = 0
    while (doomed := marked(path.with_name(path.name.partition(".")[0]), "deleting", str(n))).exists():
        n += 1
    path.rename(doomed)
    return doomed


def set_aside(path: Path) -> Path:
    """Rename a damaged step folder to the first free ``*.corrupt-<n>``; returns that path."""
    n = 0
    while (corrupt := path.with_name(f"{path.name}.corrupt-{n}")).exists():
        n += 1
    path.rename(corrupt)
    sync_folder(path.parent)
    return corrupt


def write_text_durably(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Replace a file's whole content: temporary file, fsync, rename, fsync of the folder.

    ``mode`` is subject to the umask; `OWNERS` for a file that determines what ranks run.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Return when a file's bytes are on disk, whichever process wrote them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return when a folder's entries (creations, renames) are on disk."""
    sync_file(path)


def _by_step(path: Path) -> int:
    return step_of(path) or 0
