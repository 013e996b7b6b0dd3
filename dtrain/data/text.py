"""The bytes of a folder of text files as next-byte examples; by default the source of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.errors import DataError

SPLITS = ("train", "validation")
SUFFIXES = (".py", ".txt", ".md")
VOCAB_SIZE = 256
# Not the standard library's own source: installed packages, compiled files, and tests, which are a third of it and
# often hold bytes that are no text on purpose.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class TextFile:
    """One file of the corpus: its path below the root (with "/" on every system) and its bytes."""

    name: str
    content: bytes


class ByteText:
    """Non-overlapping windows of ``block`` bytes over the text files of a folder, or over one file.

    ``data[i]`` is ``{"input": int64 [block], "target": int64 [block]}``, the target one byte ahead. Files are joined in
    the order of their names. Whole files are held out for validation, about ``held_out`` of them, chosen by a hash of the
    name so that a new file moves no other; a single file gives its last part. ``path=None`` reads the standard
    library's ``*.py`` files. Raises ``DataError`` where there is nothing, or too little, to read.

    >>> text = ByteText(block=64)
    >>> text[0]["input"].shape, text.vocab_size, text.tokens_per_example
    (torch.Size([64]), 256, 64)
    """

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        *,
        path: str | None = None,
        block: int = 128,
        split: str = "train",
        held_out: float = 0.05,
        suffixes: Sequence[str] = SUFFIXES,
    ) -> None:
        check_split(split)
        check_block(block)
        files = read_files(path, suffixes)
        parts = split_files(files, held_out)
        self.tokens_per_example = block
        self.split = split
        self._root = str(Path(path) if path is not None else _stdlib())
        self._files = files
        self._sizes = {name: len(part) for name, part in parts.items()}
        for name, part in parts.items():
            if len(part) <= block:
                raise DataError(
                    f"the {name} part of {self._root} holds {len(part)} bytes, one example needs {block + 1}; "
                    "give more text, a smaller block, or another held_out share"
                )
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(parts[split], dtype=np.uint8)

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self.tokens_per_example

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        return window(self._bytes, index, self.tokens_per_example)

    def describe(self) -> dict[str, object]:
        """What identifies the data: root, files with sizes (bytes), SHA-256 of both splits together, split sizes."""
        return {
            "root": self._root,
            "files": {file.name: len(file.content) for file in self._files},
            "sha256": digest(self._files),
            "bytes": dict(self._sizes),
            "split": self.split,
            "block": self.tokens_per_example,
        }


def check_split(split: str) -> None:
    """Raise ``ValueError`` for a split that is neither "train" nor "validation"."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; there are {' and '.join(map(repr, SPLITS))}")


def check_block(block: int) -> None:
    """Raise ``ValueError`` for a window without tokens."""
    if block < 1:
        raise ValueError(f"block is {block}; an example needs at least 1 token")


def window(tokens: npt.NDArray[np.unsignedinteger], index: int, block: int) -> dict[str, Tensor]:
    """Example ``index`` of ``tokens``: input and target, int64 ``[block]``, the target one token ahead.

    Raises ``IndexError`` outside of the whole windows that ``tokens`` holds.
    """
    count = (len(tokens) - 1) // block
    if not 0 <= index < count:
        raise IndexError(f"example {index} of {count}")
    first = index * block
    both = torch.from_numpy(tokens[first : first + block + 1].astype(np.int64))
    return {"input": both[:-1], "target": both[1:]}


def read_files(path: str | None, suffixes: Sequence[str] = SUFFIXES) -> list[TextFile]:
    """The text files below a folder, or one file whatever its suffix, sorted by name; ``None``: the standard library.

    Raises ``DataError`` where the path is missing, nothing matches or a file cannot be read.
    """
    root = _stdlib() if path is None else Path(path).expanduser()
    wanted = (".py",) if path is None else tuple(suffixes)
    skipped = STDLIB_SKIPPED if path is None else frozenset({"__pycache__"})
    if not root.exists():
        raise DataError(f"there is no file or folder {str(root)!r}; set data.path to a folder of text files")
    if root.is_file():
        found = {root.name: root}
    else:
        found = _matching(root, wanted, skipped)
    if not found:
        raise DataError(f"no file below {str(root)!r} ends in {' or '.join(wanted) or 'no suffix: suffixes is empty'}")
    return [TextFile(name, _read(found[name])) for name in sorted(found)]


def split_files(files: Sequence[TextFile], held_out: float) -> dict[str, bytes]:
    """The bytes of both splits: whole files held out by the hash of their names, a single file cut near its end.

    Raises ``DataError`` where ``held_out`` is no share strictly between 0 and 1.
    """
    if not 0.0 < held_out < 1.0:
        raise DataError(f"held_out is {held_out}; it is a share of the data, between 0 and 1")
    if len(files) == 1:
        content = files[0].content
        cut = len(content) - max(1, round(len(content) * held_out))
        return {"train": content[:cut], "validation": content[cut:]}
    ranks = {file.name: _rank(file.name) for file in files}
    lowest, highest = min(ranks.values()), max(ranks.values())
    # At least one file on each side, whatever the hashes say.
    held = {name for name, rank in ranks.items() if rank == lowest or (rank < held_out and rank != highest)}
    return {
        "train": b"".join(file.content for file in files if file.name not in held),
        "validation": b"".join(file.content for file in files if file.name in held),
    }


def digest(files: Sequence[TextFile]) -> str:
    """SHA-256 over names, sizes and contents, in order: equal for equal data wherever the folder lies."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{len(file.content)}\0".encode("utf-8", "surrogateescape"))
        total.update(file.content)
    return total.hexdigest()


def _rank(name: str) -> float:
    """A fixed number in [0, 1) for a file name, the same on every machine."""
    hashed = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(hashed[:6], "big") / 2**48


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _matching(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> dict[str, Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename!r}: {error.strerror}") from error

    found = {}
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffixes) and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error
