"""Which checkpoint a run resumes from: rank 0 chooses it for all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from dtrain.comm.transports.json_gather import gather_json
from dtrain.errors import CheckpointError, ResumeError
from dtrain.train.checkpoint import newest, verify
from dtrain.train.checkpoint.folders import had_checkpoints
from dtrain.train.checkpoint.weights import EXPORTED
from dtrain.train.config import Config

_log = logging.getLogger("dtrain.train.checkpoint")


def find_checkpoint(config: Config, tell: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest usable checkpoint of the run folder, else what ``run.resume`` points to; None for a fresh start.

    A damaged one is set aside, ``tell`` is called with a message on rank 0, and an older one is taken. A restarted run
    resumes from its own checkpoints even with ``run.resume=never``, which only forbids starting in a folder that has a
    run.

    Raises ``ResumeError`` as `look`, on all ranks.
    """
    answer: dict[str, str | None] = {}

    def note(text: str) -> None:
        _log.warning(text)  # into this rank's log
        tell(text)

    if dist.get_rank() == 0:
        try:
            path = look(Path(config.run.dir), config.run.resume, set_aside=True, tell=note)
            answer = {"path": str(path) if path is not None else None}
        except Exception as error:  # the other ranks wait for the answer
            answer = {"error": f"{error}"}
    answer = gather_json(answer)[0]
    if "error" in answer:
        raise ResumeError(f"{answer['error']}")
    return Path(answer["path"]) if answer["path"] is not None else None


def own_checkpoint(path: Path | None, folder: Path) -> bool:
    """Whether ``path`` is a checkpoint of the run in ``folder``, and not of another one that it started from."""
    return path is not None and path.resolve().parent == (folder / "checkpoints").resolve()


def look(
    folder: Path,
    resume: str,
    *,
    set_aside: bool = False,
    crc: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Path | None:
    """The checkpoint that the run in ``folder`` resumes from. ``set_aside``, ``crc``, ``tell``: see `newest`.

    Raises ``ResumeError`` if the run had checkpoints of which none is usable, if ``resume`` is a path without one, and
    for one that cannot be read but need not be damaged.
    """
    reports: list[str] = []

    def keep(text: str) -> None:
        reports.append(text)
        tell(text)

    try:
        newest_own = newest(folder / "checkpoints", crc=crc, set_aside=set_aside, tell=keep)
        if newest_own is None and had_checkpoints(folder / "checkpoints"):
            raise ResumeError(none_left(folder, reports))
        if newest_own is not None or resume in ("auto", "never"):
            return newest_own
        source = Path(resume)
        if source.name.startswith("step-"):
            verify(source, crc=crc)
            return source
        newest_other = newest(source / "checkpoints", crc=crc, tell=keep)
    except CheckpointError as error:
        raise ResumeError(f"run.resume={resume}: {error}; give another checkpoint or run folder, or auto") from error
    except OSError as error:
        raise ResumeError(
            f"a checkpoint cannot be read, though it need not be damaged ({error}); make it readable again, or move "
            "its folder out of checkpoints/ to go on from an older one"
        ) from error
    if newest_other is None:
        reasons = "".join(f"\n    {text}" for text in reports)
        raise ResumeError(f"run.resume={resume} has no usable checkpoint; give another run folder, or auto{reasons}")
    return newest_other


def none_left(folder: Path, reports: Sequence[str]) -> str:
    """The message for a run none of whose checkpoints is usable, with the ways out."""
    checkpoints = folder / "checkpoints"
    reasons = "".join(f"\n    {text}" for text in reports)
    aside = sorted(path.name for path in checkpoints.glob("step-*.corrupt-*"))
    if aside:
        reasons += f"\n    set aside as damaged before: {', '.join(aside)}"
    export = folder / EXPORTED
    weights = str(export) if export.is_file() else "FILE where you still have weights"
    return (
        f"{folder} had checkpoints, and none of them can be used:{reasons or ' their folders are gone'}\n"
        "nothing was overwritten. Put back a copy of one of these folders "
        f"(cp -r COPY {checkpoints}/step-N) and give the same command; or begin anew in another run.dir, with "
        f"run.weights={weights}; to begin at step 0 in this folder, move {checkpoints} away"
    )
