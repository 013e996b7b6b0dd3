"""Which checkpoint a run goes on from: rank 0 looks, everybody hears the same answer."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dtrain.checkpoint import newest, verify
from dtrain.comm.drivers.telling import told_by_all
from dtrain.config import Config
from dtrain.errors import ResumeError


def find_checkpoint(config: Config) -> Path | None:
    """The newest usable checkpoint of the run folder, else what ``run.resume`` points to; None for a fresh start.

    A damaged one is set aside with a warning and an older one is taken. A run that was restarted goes on from its own
    checkpoints even with ``run.resume=never``, which forbids only to begin in a folder that has a run.

    Raises ``ResumeError`` if ``run.resume`` is a path without a usable checkpoint.
    """
    found: dict[str, str | None] = {}
    if dist.get_rank() == 0:
        try:
            path = look(Path(config.run.dir), config.run.resume, set_aside=True)
            found = {"path": str(path) if path is not None else None}
        except Exception as error:  # the others are waiting; they must not wait for a rank that is gone
            found = {"error": f"{error}"}
    found = told_by_all(found)[0]
    if "error" in found:
        raise ResumeError(f"{found['error']}")
    return Path(found["path"]) if found["path"] is not None else None


def own_checkpoint(path: Path | None, folder: Path) -> bool:
    """Whether ``path`` is a checkpoint of the run in ``folder``, and not of another one that it started from."""
    return path is not None and path.resolve().parent == (folder / "checkpoints").resolve()


def look(folder: Path, resume: str, *, set_aside: bool = False, crc: bool = True) -> Path | None:
    """The checkpoint that the run in ``folder`` goes on from. ``set_aside``, ``crc``: see `checkpoint.newest`.

    Raises ``ResumeError`` if ``resume`` is a path without a usable checkpoint.
    """
    own = None
    if (folder / "checkpoints").is_dir():
        own = newest(folder / "checkpoints", crc=crc, set_aside=set_aside)
    if own is not None or resume in ("auto", "never"):
        return own
    there = Path(resume)
    if there.name.startswith("step-"):
        verify(there)
        return there
    other = newest(there / "checkpoints", crc=crc)
    if other is None:
        raise ResumeError(f"run.resume={resume} has no usable checkpoint; give another run folder, or auto")
    return other
