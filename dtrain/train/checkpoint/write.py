"""Write a checkpoint atomically, whichever process dies at whichever moment.

    every rank    its tensors -> rank-00003.safetensors, fsync; their description -> rank-00003.done, fsync
    barrier
    rank 0        checks all done-files, writes manifest.json last, fsync; renames the folder: this is the commit;
                  fsync of the parent; `latest`
    barrier
    rank 0        deletes old checkpoints

Only one run may write to a folder at a time. Nothing that readers look at changes before the rename.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dtrain.errors import CheckpointError, ResumeError
from dtrain.train.checkpoint import folders, tensors
from dtrain.train.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    RankFile,
    check_complete,
    crc32_of,
    data_name,
    done_name,
    encode_done,
    encode_manifest,
    read_done,
    read_manifest,
)
from dtrain.train.checkpoint.state import BUFFERS, OPAQUE, RNG, SEPARATOR, Placement, RankState, check_segments

STAGES = (
    "start",  # every rank: nothing done yet
    "folder",  # rank 0: leftovers cleared, temporary folder made
    "pieces",  # every rank: tensors on disk
    "done",  # every rank: done-file on disk
    "gathered",  # every rank: all ranks have said that they are done
    "manifest",  # rank 0: manifest on disk
    "aside",  # rank 0: an old checkpoint of the same step, if any, moved aside
    "renamed",  # rank 0: committed
    "latest",  # rank 0: `latest` points to it, the replaced checkpoint is gone
    "committed",  # every rank: all ranks know that the commit was tried
    "pruning",  # rank 0: old checkpoints have lost their names
    "pruned",  # rank 0: and are deleted
)
"""What ``on_stage`` is called with, in this order."""

RANK0_STAGES = frozenset({"folder", "manifest", "aside", "renamed", "latest", "pruning", "pruned"})
"""Those of `STAGES` that only rank 0 goes through."""


class PartMissing(CheckpointError):
    """Raised on rank 0 where another rank did not write its file. The cause is what that rank raised."""


_log = logging.getLogger("dtrain.train.checkpoint")


def _no_stage(name: str) -> None:
    """The ``on_stage`` of real runs."""


@dataclass(frozen=True)
class _Commit:
    """What rank 0 needs to know besides the tensors."""

    folder: Path
    step: int
    place: Placement
    shapes: Mapping[str, Sequence[int]]
    meta: Mapping[str, object]
    attempt: str
    on_stage: Callable[[str], None]

    @property
    def final(self) -> Path:
        return self.folder / folders.step_name(self.step)

    @property
    def partial(self) -> Path:
        return folders.marked(self.final, "tmp", self.attempt)


def write(
    folder: Path,
    *,
    step: int,
    state: RankState,
    place: Placement,
    shapes: Mapping[str, Sequence[int]],
    barrier: Callable[[], None],
    keep: int = 2,
    meta: Mapping[str, object] | None = None,
    attempt: str = "0",
    resumed_from: Path | None = None,
    on_stage: Callable[[str], None] = _no_stage,
) -> Path:
    """Write ``folder``/step-<step>; every rank of the mesh calls it together. Returns the step folder.

    - ``shapes``: the unsharded shape of every parameter, equal on all ranks; a tied parameter has one name.
    - ``barrier``: returns when every rank has called it (twice the longest write is a good timeout). A rank that fails
      still calls it each time and raises afterwards, so the others do not hang; a checkpoint that lacks a rank's
      pieces is not committed.
    - ``meta``: JSON values, stored in the manifest; rank 0's are used.
    - ``attempt``: equal on all ranks, another one after each restart (TORCHELASTIC_RESTART_COUNT), so that a rank of
      a dead attempt that is still writing cannot meet this one's files.
    - ``resumed_from``: the step folder that this run was started from; it is never deleted and never overwritten.
    - ``keep``: how many of the newest checkpoints stay, at least 2.

    A step folder that exists already (this run was taken back to an older step, and reaches that step again) is
    replaced: a crash at any moment leaves the old or the new one.

    Raises CheckpointError, before anything is written and on all ranks, for ``keep`` below 2 or a step that is not
    beyond ``resumed_from``; after the barriers, on the rank concerned, for a state that does not fit ``shapes``, for
    different pieces (rank 0), and OSError for a full disk; `PartMissing` on rank 0 where another rank failed so.
    """
    commit = _Commit(folder, step, place, shapes, dict(meta or {}), attempt, on_stage)
    _refuse(commit, keep, resumed_from)
    on_stage("start")
    failures: list[Exception] = []
    if place.rank == 0:
        _attempt(failures, lambda: _open_folder(commit))
    barrier()
    _attempt(failures, lambda: _write_rank(commit, state))
    barrier()
    on_stage("gathered")
    if place.rank == 0 and not failures:
        _attempt(failures, lambda: _commit(commit))
    barrier()
    if failures:
        raise failures[0]
    on_stage("committed")
    if place.rank == 0:
        prune(folder, keep=keep, never=[commit.final, *([resumed_from] if resumed_from else [])], on_stage=on_stage)
    return commit.final


def prune(
    folder: Path, *, keep: int, never: Sequence[Path] = (), on_stage: Callable[[str], None] = _no_stage
) -> list[Path]:
    """Delete all but the ``keep`` newest checkpoints and those in ``never``; returns what was deleted.

    A folder whose manifest cannot be read is neither counted nor deleted: `newest` sets it aside.
    """
    protected = {path.resolve() for path in never}
    by_age = [path for _, path in sorted(_sequences(folder))]
    old = [path for path in by_age[: max(len(by_age) - keep, 0)] if path.resolve() not in protected]
    doomed = [folders.doom(path) for path in old]
    on_stage("pruning")
    for path in doomed:
        folders.discard(path)
    on_stage("pruned")
    return old


def _refuse(commit: _Commit, keep: int, resumed_from: Path | None) -> None:
    # From the arguments alone, never from what this rank sees on disk: every rank must come to the same answer.
    if keep < 2:
        raise CheckpointError(f"keep={keep}: keep at least 2 checkpoints, the newest may turn out to be damaged")
    if commit.step < 0:
        raise CheckpointError(f"step={commit.step}: a step is not negative")
    if resumed_from is None or resumed_from.resolve().parent != commit.folder.resolve():
        return
    started = folders.step_of(resumed_from)
    if started is not None and commit.step <= started:
        raise CheckpointError(
            f"step {commit.step} would overwrite, or go behind, {resumed_from.name}, which this run was resumed from; "
            "there is nothing new to write before the next step"
        )


def _attempt(failures: list[Exception], action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # whatever it is: the other ranks wait at the barrier; it is raised after it
        _log.error("checkpoint: %s: %s", type(error).__name__, error)
        failures.append(error)


def _open_folder(commit: _Commit) -> None:
    commit.folder.mkdir(parents=True, exist_ok=True)
    folders.recover(commit.folder)
    commit.partial.mkdir()
    commit.on_stage("folder")


def _write_rank(commit: _Commit, state: RankState) -> None:
    state.validate()
    check_segments(state.segments, commit.shapes)
    rank = commit.place.rank
    pieces = _pieces(state, commit.place)
    path = commit.partial / data_name(rank)
    # Exclusive: a file of a rank of a dead attempt is an error, and must not be overwritten.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    named = {f"{section}{SEPARATOR}{name}": tensor for (section, name), tensor in pieces.items()}
    tensors.save(path, _unshared(named))
    commit.on_stage("pieces")
    sections: dict[str, dict[str, tuple[str, int]]] = {}
    for (section, name), tensor in pieces.items():
        sections.setdefault(section, {})[name] = (str(tensor.dtype).removeprefix("torch."), tensor.dim())
    file = RankFile(
        rank=rank,
        bytes=path.stat().st_size,
        crc32=crc32_of(path),
        kinds=dict(state.kinds),
        segments=dict(state.segments),
        sections=sections,
        numbers=dict(state.numbers),
    )
    folders.write_text_durably(commit.partial / done_name(rank), encode_done(file))
    commit.on_stage("done")


def _pieces(state: RankState, place: Placement) -> dict[tuple[str, str], Tensor]:
    """(section, name) -> tensor, of what this rank is to write."""
    pieces: dict[tuple[str, str], Tensor] = {}
    for section, named in state.sections.items():
        if state.kinds[section] == "per_worker" or place.replica == 0:
            pieces |= {(section, fqn): tensor for fqn, tensor in named.items()}
    pieces |= {(RNG, name): tensor for name, tensor in state.rng.items()}
    pieces |= {(OPAQUE, name): tensor for name, tensor in state.opaque.items()}
    if place.shard == 0:
        pieces |= {(BUFFERS, name): tensor for name, tensor in state.buffers.items()}
    return pieces


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two overlapping in memory, as safetensors demands. Copies only where it must:
    the pieces of a flat buffer are written from where they are.
    """
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    ends: dict[int, int] = {}
    for key, tensor in sorted(ready.items(), key=lambda item: item[1].data_ptr()):
        start, storage = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        if start < ends.get(storage, 0):
            ready[key] = tensor.clone()
        else:
            ends[storage] = start + tensor.numel() * tensor.element_size()
    return ready


def _commit(commit: _Commit) -> None:
    """Rank 0: from "every rank has written" to "this is the newest checkpoint"."""
    files = tuple(_gathered(commit, rank) for rank in range(commit.place.world))
    manifest = Manifest(
        step=commit.step,
        sequence=1 + max((sequence for sequence, _ in _sequences(commit.folder)), default=0),
        mesh=(commit.place.replicas, commit.place.shards),
        shapes={fqn: tuple(shape) for fqn, shape in commit.shapes.items()},
        meta=dict(commit.meta),
        files=files,
    )
    check_complete(manifest)
    folders.write_text_durably(commit.partial / MANIFEST, encode_manifest(manifest))
    commit.on_stage("manifest")
    replaced = folders.marked(commit.final, "replaced", commit.attempt)
    if commit.final.exists():
        commit.final.rename(replaced)
    commit.on_stage("aside")
    commit.partial.rename(commit.final)
    folders.sync_folder(commit.folder)
    commit.on_stage("renamed")
    if replaced.exists():
        folders.discard(replaced)
    folders.write_text_durably(commit.folder / folders.LATEST, commit.final.name + "\n")
    commit.on_stage("latest")


def _gathered(commit: _Commit, rank: int) -> RankFile:
    try:
        file = read_done(commit.partial / done_name(rank))
        size = (commit.partial / data_name(rank)).stat().st_size
    except (CheckpointError, FileNotFoundError) as error:
        raise PartMissing(
            f"step {commit.step} is not committed: rank {rank} has not written its part ({error}); see its log"
        ) from error
    if (file.rank, file.bytes) != (rank, size):
        raise CheckpointError(
            f"step {commit.step} is not committed: rank {rank} says {file.bytes} bytes of rank {file.rank}, "
            f"its file has {size}"
        )
    return file


def _sequences(folder: Path) -> list[tuple[int, Path]]:
    """(sequence, folder) of every committed checkpoint whose manifest can be read."""
    sequences = []
    for path in folders.step_folders(folder):
        try:
            sequences.append((read_manifest(path).sequence, path))
        except (CheckpointError, ResumeError):
            continue
    return sequences
