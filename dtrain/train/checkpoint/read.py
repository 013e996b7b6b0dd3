"""Find the newest intact checkpoint, and read this rank's state from it on any mesh.

What is restored exactly, and what by translation:

    what                    as many replicas as before          another number of replicas
    replicated sections     exact                               exact
    per-worker sections     exact, replica r's own              floating pieces: mean over the old replicas, summed
                                                                in replica order in fp64; 0-dim, integer and bool
                                                                ones: replica 0's
    buffers                 exact, replica r's own              the same as per-worker sections, 0-dim ones included
    numbers                 exact, replica r's own              replica 0's
    rng                     exact if the number of shards is    empty: seed anew
                            the same too, else empty
    opaque                  the same                            empty: begun anew

The mean preserves what error feedback needs: the sum that the residuals add to the next mean. Parameters may be sharded
differently: pieces are assembled from whichever files hold their elements.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.comm.layout import Segment
from dtrain.errors import CheckpointError, ResumeError
from dtrain.train.checkpoint import folders
from dtrain.train.checkpoint.finite import check_finite
from dtrain.train.checkpoint.manifest import (
    Holder,
    Manifest,
    RankFile,
    check_files,
    covered_from,
    holders_of,
    read_manifest,
)
from dtrain.train.checkpoint.state import BUFFERS, OPAQUE, RNG, SEPARATOR, Kind, Placement, RankState, check_segments

_log = logging.getLogger("dtrain.train.checkpoint")
_SHOWN = 5


def verify(path: Path, *, crc: bool = True) -> Manifest:
    """The manifest of step folder ``path``, once every file is there with the right size and, with ``crc``, content.

    Raises CheckpointError for damage, and with ``crc`` for NaN or Inf in it; ResumeError for a format that this dtrain
    does not know.
    """
    manifest = read_manifest(path)
    _check(path, manifest, crc=crc)
    return manifest


def newest(
    folder: Path, *, crc: bool = True, set_aside: bool = False, tell: Callable[[str], None] = _log.warning
) -> Path | None:
    """The last committed step folder in ``folder`` that is intact; None if there is none.

    A folder that is damaged, or holds NaN or Inf, is skipped, and ``tell`` is called with a message. With ``set_aside``
    (rank 0 only, before any rank writes) it is also renamed to ``*.corrupt-<n>`` if an older one is intact, and
    leftovers of dead attempts are cleared first. ``crc`` reads every byte of the candidate; without it only names and
    sizes are checked.

    Raises ResumeError if a candidate has an unknown format, and OSError for a folder that cannot be read but need not
    be damaged: resuming from an older checkpoint would be wrong then.
    """
    if set_aside:
        folders.recover(folder)
    damaged: list[tuple[Path, CheckpointError]] = []
    candidates: list[tuple[int, int, Path, Manifest]] = []
    for path in folders.step_folders(folder):
        try:
            manifest = read_manifest(path)
            candidates.append((manifest.sequence, manifest.step, path, manifest))
        except CheckpointError as error:
            damaged.append((path, error))
    intact = None
    for _, _, path, manifest in sorted(candidates, key=lambda candidate: candidate[:2], reverse=True):
        try:
            _check(path, manifest, crc=crc)
            intact = path
            break
        except CheckpointError as error:
            damaged.append((path, error))
    for path, damage in damaged:
        where = f"renamed to {folders.set_aside(path).name}" if set_aside and intact else "skipped"
        tell(f"DAMAGED CHECKPOINT {path}: {damage}; {where}")
    if damaged and intact is None:
        _log.error("no intact checkpoint is left in %s: all %d are damaged", folder, len(damaged))
    return intact


def _check(path: Path, manifest: Manifest, *, crc: bool) -> None:
    check_files(path, manifest, crc=crc)
    if crc:
        check_finite(path, manifest)


def load(
    path: Path,
    *,
    place: Placement,
    segments: Mapping[str, Segment],
    shapes: Mapping[str, Sequence[int]],
) -> RankState:
    """This rank's state from step folder ``path``, cut along ``segments``, on whatever mesh ``place`` is in.

    ``segments`` names every parameter of the model, empty segments included. Only the requested elements are read.
    ``RankState.translated`` lists what was not restored exactly (see the table above): log it.

    Raises ResumeError if the checkpoint is of another model (the first differences are listed) or of an unknown
    format, CheckpointError if files are missing, damaged or incomplete. File sizes are checked, CRCs are not: `newest`
    or `verify` did that, once for all ranks.
    """
    manifest = read_manifest(path)
    _same_model(path, manifest, shapes)
    check_segments(segments, shapes)
    translated: dict[str, str] = {}
    same_replicas = manifest.mesh[0] == place.replicas
    source = place.replica if same_replicas else 0
    sections: dict[str, dict[str, Tensor]] = {}
    with Files(path, manifest) as files:
        for section, kind in manifest.kinds.items():
            if kind == "replicated":
                sections[section] = assemble(files, section, segments, replica=0)
            elif same_replicas:
                sections[section] = assemble(files, section, segments, replica=place.replica)
            else:
                sections[section] = _mean_section(files, section, segments, translated)
        buffers = _buffers(files, source if same_replicas else None, translated)
        rng = _of_this_mesh(files, RNG, place, translated, "seed anew")
        opaque = _of_this_mesh(files, OPAQUE, place, translated, "begun anew")
    numbers = manifest.replica(source)[0].numbers
    for name in numbers:
        if not same_replicas and len({file.numbers.get(name) for file in manifest.files}) > 1:
            translated[f"numbers.{name}"] = "replica 0's"
    kinds: dict[str, Kind] = dict(manifest.kinds)
    state = RankState(dict(segments), sections, kinds, dict(numbers), rng, buffers, opaque)
    state.translated = translated
    return state


class Files:
    """The rank files of one checkpoint, opened when first needed and mapped into memory; a context manager."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._open: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def whole(self, rank: int, section: str, name: str) -> Tensor:
        """A copy of one tensor of one rank's file."""
        key = f"{section}{SEPARATOR}{name}"
        try:
            tensor: Tensor = self._file(rank).get_tensor(key).clone()
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / self.manifest.files[rank].name}: {key}: {error}") from error
        return tensor

    def copy(self, out: Tensor, rank: int, section: str, fqn: str, start: int) -> None:
        """Fill ``out`` [n] with the elements [start, start + n) of one rank's piece."""
        key = f"{section}{SEPARATOR}{fqn}"
        try:
            out.copy_(self._file(rank).get_slice(key)[start : start + out.numel()])
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{self.path / self.manifest.files[rank].name}: {key}: {error}") from error

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            file = self.manifest.files[rank]
            path = self.path / file.name
            try:
                size = path.stat().st_size
                if size != file.bytes:
                    raise CheckpointError(f"{path} has {size} bytes, the manifest says {file.bytes}")
                self._open[rank] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (FileNotFoundError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return self._open[rank]


def assemble(files: Files, section: str, segments: Mapping[str, Segment], *, replica: int) -> dict[str, Tensor]:
    """One replica's tensors of ``section``, cut along ``segments``; parameters that the section lacks are left out.

    Raises CheckpointError, naming the first missing element, if the files do not hold all of a segment.
    """
    holders = holders_of(files.manifest.replica(replica), section)
    return {fqn: _piece(files, section, want, holders[fqn]) for fqn, want in segments.items() if fqn in holders}


def _piece(files: Files, section: str, want: Segment, holders: Sequence[Holder]) -> Tensor:
    if holders[0].dim == 0:
        return files.whole(min(holder.rank for holder in holders), section, want.fqn)
    out = torch.empty(want.numel, dtype=getattr(torch, holders[0].dtype))
    position = want.offset
    for holder in holders:
        stop = min(holder.segment.stop, want.stop)
        if holder.segment.offset <= position < stop:
            target = out[position - want.offset : stop - want.offset]
            files.copy(target, holder.rank, section, want.fqn, position - holder.segment.offset)
            position = stop
    if position < want.stop:
        end = covered_from(position, (holder.segment for holder in holders))
        raise CheckpointError(
            f"{files.path}: section {section!r} holds no element {end} of {want.fqn!r}; "
            f"asked for [{want.offset}, {want.stop})"
        )
    return out


def _mean_section(
    files: Files, section: str, segments: Mapping[str, Segment], translated: dict[str, str]
) -> dict[str, Tensor]:
    """Every new replica's tensors of a per-worker section, where the number of replicas changed."""
    replicas = files.manifest.mesh[0]
    holders = [holders_of(files.manifest.replica(replica), section) for replica in range(replicas)]
    tensors: dict[str, Tensor] = {}
    how: set[str] = set()
    for fqn, want in segments.items():
        entries = [of_replica.get(fqn) for of_replica in holders]
        present = [entry for entry in entries if entry is not None]
        if not present:
            continue
        if len(present) < replicas:
            raise CheckpointError(
                f"{files.path}: section {section!r} holds {fqn!r} for {len(present)} of {replicas} replicas only; "
                f"no mean can be made of it: resume with {replicas} replicas"
            )
        if len({(holder.dtype, holder.dim) for entry in present for holder in entry}) > 1:
            raise CheckpointError(
                f"{files.path}: section {section!r}: the ranks disagree about dtype or 0-dim of {fqn!r}"
            )
        if present[0][0].dim == 0:
            tensors[fqn] = _piece(files, section, want, present[0])
            how.add("0-dim ones replica 0's")
        else:
            tensors[fqn], rule = _mean(_piece(files, section, want, entry) for entry in present)
            how.add(rule)
    translated[section] = ", ".join(sorted(how)) or "empty"
    return tensors


def _mean(pieces: Iterator[Tensor]) -> tuple[Tensor, str]:
    """(tensor, rule) for one tensor of several replicas, read one at a time, in replica order.

    Raises CheckpointError where their shapes differ.
    """
    first = next(pieces)
    if not first.is_floating_point():
        return first, "integer ones replica 0's"
    total, count = first.double(), 1
    for piece in pieces:
        if piece.shape != first.shape:
            raise CheckpointError(
                f"replica 0 holds a tensor of shape {tuple(first.shape)}, another {tuple(piece.shape)}"
            )
        total += piece.double()
        count += 1
    return (first if count == 1 else (total / count).to(first.dtype)), f"mean of {count}"


def _buffers(files: Files, replica: int | None, translated: dict[str, str]) -> dict[str, Tensor]:
    """The buffers of one replica, or, for None, of all of them together."""
    firsts = [files.manifest.replica(index)[0] for index in range(files.manifest.mesh[0])]
    if replica is not None:
        return {name: files.whole(firsts[replica].rank, BUFFERS, name) for name in _names(firsts[replica], BUFFERS)}
    buffers: dict[str, Tensor] = {}
    how: set[str] = set()
    for name in _names(firsts[0], BUFFERS):
        owners = [file.rank for file in firsts if name in _names(file, BUFFERS)]
        buffers[name], rule = _mean(files.whole(rank, BUFFERS, name) for rank in owners)
        how.add(rule)
    if how:
        translated[BUFFERS] = ", ".join(sorted(how))
    return buffers


def _of_this_mesh(
    files: Files, section: str, place: Placement, translated: dict[str, str], instead: str
) -> dict[str, Tensor]:
    if files.manifest.mesh == (place.replicas, place.shards):
        names = _names(files.manifest.files[place.rank], section)
        return {name: files.whole(place.rank, section, name) for name in names}
    if any(_names(file, section) for file in files.manifest.files):
        translated[section] = f"dropped: {instead}"
    return {}


def _names(file: RankFile, section: str) -> list[str]:
    return list(file.sections.get(section, {}))


def _same_model(path: Path, manifest: Manifest, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ResumeError with the first differences between the stored parameters and the model's."""
    expected = {fqn: tuple(shape) for fqn, shape in shapes.items()}
    stored = manifest.shapes
    differences = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in (
            ("missing (the model has them, the checkpoint has not)", sorted(expected.keys() - stored.keys())),
            ("unexpected (the checkpoint has them, the model has not)", sorted(stored.keys() - expected.keys())),
            (
                "of another shape",
                [
                    f"{fqn} is {stored[fqn]} in the checkpoint and {expected[fqn]} in the model"
                    for fqn in sorted(expected.keys() & stored.keys())
                    if expected[fqn] != stored[fqn]
                ],
            ),
        )
        if names
    ]
    if differences:
        raise ResumeError(
            f"{path} is a checkpoint of another model: {'; '.join(differences)}. "
            "Build the model that it was written with, or start anew in another run folder"
        )
