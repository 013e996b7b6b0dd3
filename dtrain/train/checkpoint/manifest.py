"""``manifest.json``: which file of a checkpoint holds which elements. Written last, so its presence means "complete".

The text is one JSON object with a ``crc32`` over the rest of it, so that a flipped byte in an offset is detected like
one in a tensor. A later format must keep that sum: an older dtrain then reports "unknown format", not "damaged".
"""

from __future__ import annotations

import errno
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from dtrain.comm.layout import Segment
from dtrain.comm.runtime.saved import numbers_of_integers
from dtrain.errors import CheckpointError, ResumeError
from dtrain.launchers import strict_json
from dtrain.train.checkpoint.state import Kind

FORMAT = 2
READS = (1, 2)
"""Format 1 kept floats as the integers of their bits."""
MANIFEST = "manifest.json"

_CHUNK = 1 << 22
_ITEM_BYTES = {name: dtype.itemsize for name in dir(torch) if isinstance(dtype := getattr(torch, name), torch.dtype)}
"""By their names in manifests."""


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote; also the content of its done-file.

    ``sections``: section -> fqn -> (dtype, dim); dim 0 is a 0-dim tensor, 1 is the flat piece of ``segments[fqn]``.
    The sections "rng" and "buffers" are listed here too.
    """

    rank: int
    bytes: int
    crc32: int
    kinds: dict[str, Kind]
    segments: dict[str, Segment]
    sections: dict[str, dict[str, tuple[str, int]]]
    numbers: dict[str, int | float]

    @property
    def name(self) -> str:
        return data_name(self.rank)


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents. ``sequence`` counts commits in a folder: the highest is the newest, also when
    a run was taken back to an older step. ``mesh`` is (replicas, shards); ``files`` are in rank order.
    """

    step: int
    sequence: int
    mesh: tuple[int, int]
    shapes: dict[str, tuple[int, ...]]
    meta: dict[str, object]
    files: tuple[RankFile, ...]

    @property
    def kinds(self) -> dict[str, Kind]:
        return self.files[0].kinds

    def replica(self, replica: int) -> tuple[RankFile, ...]:
        """The files of one replica, in shard order."""
        shards = self.mesh[1]
        return self.files[replica * shards : (replica + 1) * shards]


def data_name(rank: int) -> str:
    """Name of the file with a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def done_name(rank: int) -> str:
    """Name of the file that a rank writes once its tensors are on disk."""
    return f"rank-{rank:05d}.done"


def encode_manifest(manifest: Manifest) -> str:
    """The text that `read_manifest` reads; TypeError or ValueError if ``meta`` holds what JSON cannot."""
    return _seal(
        {
            "format": FORMAT,
            "step": manifest.step,
            "sequence": manifest.sequence,
            "mesh": list(manifest.mesh),
            "shapes": {fqn: list(shape) for fqn, shape in manifest.shapes.items()},
            "meta": manifest.meta,
            "files": [_file_to_json(file) for file in manifest.files],
        }
    )


def encode_done(file: RankFile) -> str:
    """The text that `read_done` reads."""
    return _seal(_file_to_json(file))


def read_done(path: Path) -> RankFile:
    """Raises CheckpointError if it is missing or damaged."""
    body = _unseal(path)
    try:
        return _file_from_json(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a done-file of a rank: {error!r}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder.

    Raises CheckpointError if it is missing or damaged, ResumeError if its format is not known here.
    """
    path = folder / MANIFEST
    body = _unseal(path)
    if body.get("format") not in READS:
        raise ResumeError(
            f"{path} has format {body.get('format')!r}, this dtrain reads formats {READS[0]} to {FORMAT}: use the "
            "dtrain that wrote it"
        )
    try:
        mesh = _integers(body["mesh"], 2)
        manifest = Manifest(
            step=strict_json.integer(body, "step"),
            sequence=strict_json.integer(body, "sequence"),
            mesh=(mesh[0], mesh[1]),
            shapes={fqn: _integers(shape) for fqn, shape in strict_json.object_of(body, "shapes").items()},
            meta=strict_json.object_of(body, "meta"),
            files=tuple(_file_from_json(file) for file in body["files"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} does not hold what a manifest holds: {error!r}") from error
    if not 0 < len(manifest.files) == math.prod(manifest.mesh):
        raise CheckpointError(f"{path} lists {len(manifest.files)} files for a mesh of {manifest.mesh}")
    if [file.rank for file in manifest.files] != list(range(len(manifest.files))):
        raise CheckpointError(f"{path} lists its files in another order than that of their ranks")
    _check_segments(path, manifest)
    return manifest


def _check_segments(path: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        for fqn, segment in file.segments.items():
            if fqn not in manifest.shapes or segment.stop > math.prod(manifest.shapes[fqn]):
                raise CheckpointError(f"{path}: rank {file.rank} lists {segment}, which its parameter does not have")
        if file.kinds != manifest.kinds:
            raise CheckpointError(f"{path}: ranks 0 and {file.rank} list different sections: {file.kinds}")


def check_files(folder: Path, manifest: Manifest, *, crc: bool) -> None:
    """Raise CheckpointError unless every file is there with its size and, if asked for, its CRC-32."""
    for file in manifest.files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                raise CheckpointError(f"{path} has {size} bytes, the manifest says {file.bytes}")
            if crc and crc32_of(path) != file.crc32:
                raise CheckpointError(f"{path} has another CRC-32 than the manifest says: its content changed")
        except OSError as error:
            raise _damage(path, error) from error


def check_complete(manifest: Manifest) -> None:
    """Raise CheckpointError unless each section holds every element of each parameter that it lists.

    Called before the commit: a hole found at the resume is found too late.
    """
    if any(file.kinds != manifest.kinds for file in manifest.files):
        raise CheckpointError("the ranks declare different sections or kinds; they must be equal on all ranks")
    for replica in range(manifest.mesh[0]):
        for section, kind in manifest.kinds.items():
            if kind == "replicated" and replica > 0:
                continue
            for fqn, holders in holders_of(manifest.replica(replica), section).items():
                where = f"section {section!r}, {fqn!r}, replica {replica}"
                if len({(holder.dtype, holder.dim) for holder in holders}) > 1:
                    raise CheckpointError(f"{where}: the shards disagree about dtype or 0-dim: {holders}")
                covered = covered_from(0, (holder.segment for holder in holders))
                if holders[0].dim == 1 and covered < math.prod(manifest.shapes[fqn]):
                    raise CheckpointError(f"{where}: no rank holds the element {covered} of {manifest.shapes[fqn]}")


@dataclass(frozen=True)
class Holder:
    """One rank's part of a section's parameter."""

    rank: int
    segment: Segment
    dtype: str
    dim: int


def holders_of(files: Iterable[RankFile], section: str) -> dict[str, list[Holder]]:
    """Map fqn -> its holders in ``section``, ordered by offset, then by rank."""
    holders: dict[str, list[Holder]] = {}
    for file in files:
        for fqn, (dtype, dim) in file.sections.get(section, {}).items():
            holders.setdefault(fqn, []).append(Holder(file.rank, file.segments[fqn], dtype, dim))
    for entries in holders.values():
        entries.sort(key=lambda holder: (holder.segment.offset, holder.rank))
    return holders


def covered_from(start: int, segments: Iterable[Segment]) -> int:
    """Where the gapless cover of ``segments``, sorted by offset, that begins at ``start`` ends.

    >>> covered_from(0, [Segment("w", 0, 3), Segment("w", 2, 3), Segment("w", 7, 1)])
    5
    """
    for segment in segments:
        if segment.offset <= start:
            start = max(start, segment.stop)
    return start


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes, as zlib counts it."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _damage(path: Path, error: OSError) -> Exception:
    """A file that is gone or unreadable is damage; anything else (permissions, a stale mount) must not be."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EIO):
        return CheckpointError(f"{path} cannot be read: {error.strerror}")
    return error


def _canonical(body: Mapping[str, object]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _seal(body: Mapping[str, object]) -> str:
    # Through JSON once, so that the sum is over what a reader gets back (tuples as lists, keys as text).
    plain = strict_json.parse(strict_json.dumps(body))
    return _canonical({**plain, "crc32_of_the_rest": zlib.crc32(_canonical(plain).encode())})


def _unseal(path: Path) -> dict[str, Any]:
    try:
        body = strict_json.read(path)
    except OSError as error:
        raise _damage(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if body.pop("crc32_of_the_rest", None) != zlib.crc32(_canonical(body).encode()):
        raise CheckpointError(f"{path} does not have the CRC-32 that it says it has: its content changed")
    return body


def _file_to_json(file: RankFile) -> dict[str, object]:
    return {
        "rank": file.rank,
        "bytes": file.bytes,
        "crc32": file.crc32,
        "kinds": file.kinds,
        "segments": {fqn: [segment.offset, segment.numel] for fqn, segment in file.segments.items()},
        "sections": file.sections,
        "numbers": file.numbers,
    }


def _file_from_json(body: object) -> RankFile:
    """Raises KeyError, TypeError or ValueError for an invalid description of a rank's file."""
    if not isinstance(body, dict):
        raise TypeError(f"a file is described by {body!r:.80}")
    pairs = {fqn: _integers(pair, 2) for fqn, pair in strict_json.object_of(body, "segments").items()}
    file = RankFile(
        rank=strict_json.integer(body, "rank"),
        bytes=strict_json.integer(body, "bytes"),
        crc32=strict_json.integer(body, "crc32"),
        kinds=cast(dict[str, Kind], strict_json.object_of(body, "kinds")),
        segments={fqn: Segment(fqn, offset, numel) for fqn, (offset, numel) in pairs.items()},
        sections={
            section: {name: _entry(entry) for name, entry in strict_json.object_of(body["sections"], section).items()}
            for section in strict_json.object_of(body, "sections")
        },
        numbers=_numbers(body),
    )
    if wrong := [section for section, kind in file.kinds.items() if kind not in get_args(Kind)]:
        raise ValueError(f"section {wrong[0]!r} is of unknown kind {file.kinds[wrong[0]]!r:.80}")
    sizes = 0
    for section in file.kinds:
        for fqn, (dtype, dim) in file.sections.get(section, {}).items():
            sizes += file.segments[fqn].numel * _ITEM_BYTES[dtype] if dim else 0
    if sizes > file.bytes:
        raise ValueError(f"its {file.bytes} bytes cannot hold the {sizes} bytes of its tensors")
    return file


def _integers(value: object, count: int | None = None) -> tuple[int, ...]:
    """A list of ``count`` non-negative integers."""
    if not isinstance(value, list) or any(type(entry) is not int or entry < 0 for entry in value):
        raise ValueError(f"{value!r:.80} is no list of integers")
    if count is not None and len(value) != count:
        raise ValueError(f"{value!r:.80} has {len(value)} parts, not {count}")
    return tuple(value)


def _numbers(body: dict[str, object]) -> dict[str, int | float]:
    """The numbers in the description of a rank's file."""
    section = "numbers" if "numbers" in body else "integers"
    numbers = strict_json.object_of(body, section)
    for name in numbers:
        if strict_json.number(numbers, name) is None:
            raise ValueError(f"{name} is no number")
    return cast(dict[str, int | float], numbers if section == "numbers" else numbers_of_integers(numbers))


def _entry(value: object) -> tuple[str, int]:
    """(dtype, dim) of a tensor."""
    if not isinstance(value, list) or len(value) != 2 or value[0] not in _ITEM_BYTES or type(value[1]) is not int:
        raise ValueError(f"{value!r:.80} is no type and number of dimensions")
    return value[0], value[1]
