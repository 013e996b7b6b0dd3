"""A file of tokens on disk, mapped into memory: what ``dtrain data tokenize`` writes.

A folder with two files. ``tokens.bin``: little-endian unsigned integers of 1, 2 or 4 bytes, nothing else.
``tokens.json``: version, dtype, count, vocab_size, held_out (ranges ``[start, stop]`` of tokens that are the validation
split, ascending), sha256 of ``tokens.bin``, source (where the text came from, for people).

Only the pages of the examples that a rank visits are ever read, so the file may be larger than memory.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dtrain.data.text import check_index, check_window, window, window_count
from dtrain.errors import DataError

VERSION = 1
TOKENS = "tokens.bin"
MANIFEST = "tokens.json"
# Little-endian on every machine; by their names in the manifest.
DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint8": np.dtype("<u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
AGAIN = "write it again with `dtrain data tokenize`"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``tokens.json`` says; ``held_out`` are ascending, disjoint ranges ``(start, stop)`` of tokens."""

    version: int
    dtype: str
    count: int
    vocab_size: int
    held_out: tuple[tuple[int, int], ...]
    sha256: str
    source: dict[str, object]

    def to_json(self) -> str:
        """The text of ``tokens.json``."""
        return json.dumps(asdict(self), indent=1) + "\n"


class TokenFile:
    """Non-overlapping windows of ``block`` tokens of a tokenized text; see the module for the format.

    ``data[i]`` is ``{"input": int64 [block], "target": int64 [block]}``, the target one token ahead. No window crosses
    from one split into the other. Raises ``DataError`` for a folder that is missing, damaged, of another version or too
    short. The size of ``tokens.bin`` is checked, its digest is not: that would read all of it in every worker.
    """

    def __init__(self, *, path: str, block: int = 128, split: str = "train") -> None:
        check_window(split, block)
        folder = Path(path).expanduser()
        self._manifest = manifest = read_manifest(folder)
        self._tokens: npt.NDArray[np.unsignedinteger] = _map(folder / TOKENS, manifest)
        self.vocab_size = manifest.vocab_size
        self.tokens_per_example = block
        self._path, self._split = str(folder), split
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
        which = bisect_right(self._ends, index)
        within = index - (self._ends[which - 1] if which else 0)
        block = self.tokens_per_example
        return window(self._tokens, self._starts[which] + within * block, block)

    def describe(self) -> dict[str, object]:
        """What identifies the data: path, the manifest (its sha256 above all) and sizes of the splits in tokens."""
        held = sum(stop - start for start, stop in self._manifest.held_out)
        return {
            "path": self._path,
            "tokens": {"train": self._manifest.count - held, "validation": held},
            "block": self.tokens_per_example,
            "split": self._split,
            **asdict(self._manifest),
        }


def read_manifest(folder: Path) -> Manifest:
    """What ``tokens.json`` in ``folder`` says; ``DataError`` where it is missing, damaged or of another version."""
    file = folder / MANIFEST
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}; `dtrain data tokenize` writes it") from error
    except ValueError as error:
        raise DataError(f"{str(file)!r} is damaged ({error}); {AGAIN}") from error
    if not isinstance(found, dict) or "version" not in found:
        raise DataError(f"{str(file)!r} is no description of a token file: it has no version; {AGAIN}")
    if found["version"] != VERSION:
        raise DataError(f"{str(file)!r} has version {found['version']!r}, this dtrain reads {VERSION}; {AGAIN}")
    missing = [field.name for field in fields(Manifest) if field.name not in found]
    if missing:
        raise DataError(f"{str(file)!r} lacks {', '.join(missing)}; {AGAIN}")
    try:
        manifest = Manifest(
            version=VERSION,
            dtype=str(found["dtype"]),
            count=int(found["count"]),
            vocab_size=int(found["vocab_size"]),
            held_out=tuple((int(start), int(stop)) for start, stop in found["held_out"]),
            sha256=str(found["sha256"]),
            source=dict(found["source"]),
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{str(file)!r} is damaged ({error}); {AGAIN}") from error
    _check(manifest, file)
    return manifest


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
