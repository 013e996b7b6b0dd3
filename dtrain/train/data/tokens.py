"""A file of tokens on disk, mapped into memory: what ``dtrain data tokenize`` writes.

A folder with two files. ``tokens.bin``: little-endian unsigned integers of 1, 2 or 4 bytes, nothing else.
``tokens.json``: version, dtype, count, vocab_size, held_out (ranges ``[start, stop]`` of tokens that are the validation
split, ascending), sha256 of ``tokens.bin`` (empty: not known), source (where the text came from, for people), and seal,
a SHA-256 over all the others, which a file written by hand may leave out.

Only the pages of the examples that a rank visits are ever read, so the file may be larger than memory. All of it is
read once, by `TokenFile.check_content`, when a run is launched.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dtrain.errors import DataError
from dtrain.launchers import strict_json
from dtrain.train.data.text import check_index, check_window, window, window_count

VERSION = 1
CHUNK = 1 << 22
TOKENS = "tokens.bin"
MANIFEST = "tokens.json"
# Little-endian on every machine; by their names in the manifest.
DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint8": np.dtype("<u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
SEAL = "seal"
AGAIN = "write it again with `dtrain data tokenize`"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``tokens.json``; ``held_out`` are ascending, disjoint ranges ``(start, stop)`` of tokens."""

    version: int
    dtype: str
    count: int
    vocab_size: int
    held_out: tuple[tuple[int, int], ...]
    sha256: str
    source: dict[str, object]

    def to_json(self) -> str:
        """The text of ``tokens.json``."""
        return strict_json.dumps({**asdict(self), SEAL: _seal(asdict(self))}, indent=1)


class TokenFile:
    """Non-overlapping windows of ``block`` tokens of a tokenized text; see the module for the format.

    ``data[i]`` is ``{"input": int64 [block], "target": int64 [block]}``, the target one token ahead. No window crosses
    from one split into the other. Raises ``DataError`` for a folder that is missing, damaged, of another version or too
    short. The size of ``tokens.bin`` is checked, its digest by `check_content` only: that reads all of it.
    """

    def __init__(self, *, path: str, block: int = 128, split: str = "train") -> None:
        check_window(split, block)
        folder = Path(path).expanduser()
        self._manifest = manifest = read_manifest(folder)
        self._tokens: npt.NDArray[np.unsignedinteger] = _map(folder / TOKENS, manifest)
        self.vocab_size = manifest.vocab_size
        self.tokens_per_example = block
        described = manifest.source.get("tokenizer")
        self.tokenizer: dict[str, object] = dict(described) if isinstance(described, Mapping) else {}
        self._path, self._split = str(folder), split
        self._modified = (folder / TOKENS).stat().st_mtime_ns
        ranges = manifest.held_out if split == "validation" else _gaps(manifest)
        self._starts = [start for start, _ in ranges]
        # _ends[k]: how many examples the ranges up to and with the k-th hold.
        self._ends = list(accumulate(window_count(stop - start, block) for start, stop in ranges))
        if not len(self):
            size = sum(stop - start for start, stop in ranges)
            raise DataError(
                f"the {split} part of {str(folder)!r} holds {size} tokens, and one example takes {block + 1} in a row; "
                "take a smaller block or tokenize more text"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        check_index(index, len(self))
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number - 1] if number else 0)
        block = self.tokens_per_example
        return window(self._tokens, self._starts[number] + within * block, block)

    def describe(self) -> dict[str, object]:
        """What identifies the data: path, the manifest (its sha256 above all) and sizes of the splits in tokens."""
        held = sum(stop - start for start, stop in self._manifest.held_out)
        return {
            "path": self._path,
            "tokens": {"train": self._manifest.count - held, "validation": held},
            "block": self.tokens_per_example,
            "split": self._split,
            "modified": self._modified,
            **asdict(self._manifest),
        }

    def check_content(self) -> None:
        """Read all of ``tokens.bin``. Raises ``DataError`` where it does not match its description."""
        file, highest, sha = Path(self._path) / TOKENS, 0, hashlib.sha256()
        for start in range(0, len(self._tokens), CHUNK):
            chunk = self._tokens[start : start + CHUNK]
            sha.update(chunk.data)
            highest = max(highest, int(chunk.max()))
        if self._manifest.sha256 not in ("", sha.hexdigest()):
            raise DataError(
                f"{str(file)!r} has changed since it was written: its SHA-256 is {sha.hexdigest()[:16]}..., its "
                f"description says {self._manifest.sha256[:16]}...; {AGAIN}"
            )
        if highest >= self.vocab_size:
            raise DataError(
                f"{str(file)!r} holds the token {highest}, its description says vocab_size {self.vocab_size}; {AGAIN}"
            )


def read_manifest(folder: Path) -> Manifest:
    """Read ``tokens.json`` in ``folder``; ``DataError`` where it is missing, damaged or of another version."""
    file = folder / MANIFEST
    try:
        entries = strict_json.read(file)
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}; `dtrain data tokenize` writes it") from error
    except ValueError as error:
        raise DataError(f"{str(file)!r} is damaged ({error}); {AGAIN}") from error
    if "version" not in entries:
        raise DataError(f"{str(file)!r} is no description of a token file: it has no version; {AGAIN}")
    if entries["version"] != VERSION:
        raise DataError(f"{str(file)!r} has version {entries['version']!r}, this dtrain reads {VERSION}; {AGAIN}")
    missing = [field.name for field in fields(Manifest) if field.name not in entries]
    if missing:
        raise DataError(f"{str(file)!r} lacks {', '.join(missing)}; {AGAIN}")
    seal = entries.pop(SEAL, None)
    if unknown := sorted(entries.keys() - {field.name for field in fields(Manifest)}):
        raise DataError(f"{str(file)!r} has keys that no description has: {', '.join(unknown)[:80]}; {AGAIN}")
    if seal is not None and seal != _seal(entries):
        raise DataError(f"{str(file)!r} has changed since it was written: its seal is another one; {AGAIN}")
    try:
        manifest = Manifest(
            version=VERSION,
            dtype=_text(entries, "dtype"),
            count=strict_json.integer(entries, "count"),
            vocab_size=strict_json.integer(entries, "vocab_size"),
            held_out=tuple(_range(pair) for pair in cast("list[object]", entries["held_out"])),
            sha256=_text(entries, "sha256"),
            source=strict_json.object_of(entries, "source"),
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{str(file)!r} is damaged ({error}); {AGAIN}") from error
    _check(manifest, file)
    return manifest


def _text(entries: Mapping[str, object], name: str) -> str:
    value = entries[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.80}, not a text")
    return value


def _range(pair: object) -> tuple[int, int]:
    if not isinstance(pair, list) or len(pair) != 2 or any(type(edge) is not int for edge in pair):
        raise ValueError(f"held_out has {pair!r:.80}, not a range")
    return pair[0], pair[1]


def _seal(body: Mapping[str, object]) -> str:
    plain = strict_json.parse(strict_json.dumps(body))  # tuples as lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _check(manifest: Manifest, file: Path) -> None:
    if manifest.dtype not in DTYPES:
        raise DataError(f"{str(file)!r} says dtype {manifest.dtype!r}; there are {', '.join(DTYPES)}; {AGAIN}")
    if not 1 <= manifest.vocab_size <= np.iinfo(DTYPES[manifest.dtype]).max + 1:
        raise DataError(f"{str(file)!r} says vocab_size {manifest.vocab_size} in {manifest.dtype}; {AGAIN}")
    edges = [0, *(edge for pair in manifest.held_out for edge in pair), manifest.count]
    if manifest.count < 1 or any(before > after for before, after in pairwise(edges)):
        held = [list(pair) for pair in manifest.held_out]
        raise DataError(
            f"{str(file)!r} says held_out {held} of {manifest.count} tokens: not ascending ranges of them; {AGAIN}"
        )


def _map(file: Path, manifest: Manifest) -> npt.NDArray[np.unsignedinteger]:
    dtype = DTYPES[manifest.dtype]
    wanted = manifest.count * dtype.itemsize
    try:
        size = file.stat().st_size
        if size != wanted:
            state = "truncated" if size < wanted else "too long"
            raise DataError(f"{str(file)!r} is {state}: {size} bytes, its description says {wanted}; {AGAIN}")
        mapped: npt.NDArray[np.unsignedinteger] = np.memmap(file, dtype=dtype, mode="r")
        return mapped
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}; {AGAIN}") from error


def _gaps(manifest: Manifest) -> list[tuple[int, int]]:
    """The ranges between the held-out ones: the training split."""
    edges = [0, *(edge for pair in manifest.held_out for edge in pair), manifest.count]
    return list(zip(edges[::2], edges[1::2], strict=True))
