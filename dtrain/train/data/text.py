"""The bytes of a folder of text files as next-byte examples; by default the source of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

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


class ByteText:
    """Non-overlapping windows of ``block`` bytes over the text files of a folder, or over one file, held in memory.

    ``data[i]`` is ``{"input": int64 [block], "target": int64 [block]}``, the target one byte ahead. Files are joined in
    the order of their names. Whole files are held out for validation, about ``held_out`` of them, chosen by a hash of
    the name; a single file gives its last part. ``path=None`` reads the standard library's ``*.py`` files, whatever
    ``suffixes`` says. Raises ``DataError`` where there is nothing, or too little, to read.

    >>> text = ByteText(block=64)
    >>> text[0]["input"].shape, text.vocab_size, text.tokens_per_example
    (torch.Size([64]), 256, 64)
    """

    vocab_size = VOCAB_SIZE
    tokenizer: Mapping[str, object] = MappingProxyType({"name": "bytes"})

    def __init__(
        self,
        *,
        path: str | None = None,
        block: int = 128,
        split: str = "train",
        held_out: float = 0.05,
        suffixes: Sequence[str] = SUFFIXES,
    ) -> None:
        check_window(split, block)
        paths = find_files(path, suffixes)
        contents = {name: read_file(file) for name, file in paths.items()}
        parts = split_contents(contents, held_out)
        root = str(root_of(path))
        for name, content in parts.items():
            if len(content) <= block:
                raise DataError(
                    f"the {name} part of {root!r} holds {len(content)} bytes, and one example takes {block + 1}; "
                    "give more text, a smaller block or another held_out"
                )
        self.tokens_per_example = block
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(parts[split], dtype=np.uint8)
        self._description: dict[str, object] = {
            "root": root,
            "files": {name: len(content) for name, content in contents.items()},
            "bytes": {name: len(content) for name, content in parts.items()},
            "sha256": digest(contents),
            "block": block,
            "split": split,
        }

    def __len__(self) -> int:
        return window_count(len(self._bytes), self.tokens_per_example)

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        check_index(index, len(self))
        return window(self._bytes, index * self.tokens_per_example, self.tokens_per_example)

    def describe(self) -> dict[str, object]:
        """What identifies the data: root, files with sizes, sizes of the splits (bytes), SHA-256 of both together."""
        return dict(self._description)


def check_window(split: str, block: int) -> None:
    """Raise ``DataError`` for a split that is neither "train" nor "validation", and for a block without tokens."""
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; there are {' and '.join(map(repr, SPLITS))}")
    if block < 1:
        raise DataError(f"block is {block}; an example takes at least 1 token")


def check_index(index: int, count: int) -> None:
    """Raise ``IndexError`` outside of [0, count); this ends iteration over a data set."""
    if not 0 <= index < count:
        raise IndexError(f"example {index} of {count}")


def window_count(tokens: int, block: int) -> int:
    """The number of non-overlapping windows of ``block`` inputs, each with the token after it, in ``tokens``."""
    return max(0, tokens - 1) // block


def window(tokens: npt.NDArray[np.unsignedinteger], first: int, block: int) -> dict[str, Tensor]:
    """The example that starts at token ``first``: input and target, int64 ``[block]``, the target one token ahead."""
    both = torch.from_numpy(tokens[first : first + block + 1].astype(np.int64))
    return {"input": both[:-1], "target": both[1:]}


def root_of(path: str | Path | None) -> Path:
    """Where the text lies: ``path``, or for ``None`` the folder of the standard library."""
    if path == "":
        raise DataError("the path of the text is empty; give a folder or a file, or null for the standard library")
    return Path(sysconfig.get_path("stdlib")) if path is None else Path(path).expanduser()


def find_files(path: str | Path | None, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """The text files below a folder by name (with "/" on every system), sorted; a single file whatever its suffix.

    ``None`` stands for the standard library. Hidden folders (.git, .venv) are left out and links to
    folders are not followed. Raises ``DataError`` where the path is
    missing, nothing matches or a folder cannot be listed.
    """
    root = root_of(path)
    if isinstance(suffixes, str):
        raise DataError(f"suffixes is the text {suffixes!r}; give a list: [{suffixes!r}]")
    wanted = tuple(suffixes) if path is not None else (".py",)
    skipped = STDLIB_SKIPPED if path is None else frozenset({"__pycache__"})
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise DataError(f"cannot open {str(root)!r}: {error.strerror}; give a folder of text files") from error
    if not stat.S_ISDIR(mode):
        return {root.name: root}

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename!r}: {error.strerror}") from error

    paths = {}
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        files = (Path(folder, name) for name in names if name.endswith(wanted))
        paths.update({file.relative_to(root).as_posix(): file for file in files})
    if not paths:
        raise DataError(
            f"no file below {str(root)!r} ends in {' or '.join(wanted) or 'one of no suffixes'}; say how yours end, "
            "for example data.suffixes=[.h,.rst]"
        )
    return dict(sorted(paths.items()))


def read_file(file: Path) -> bytes:
    """The bytes of a regular file; ``DataError`` where it cannot be read (a pipe would wait for ever)."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{str(file)!r} is not a regular file; take it out of the folder")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}") from error


def held_out_names(names: Collection[str], held_out: float) -> frozenset[str]:
    """The names whose hash is below ``held_out``, about that fraction of them: a new name moves no other.

    Of two names or more at least one is held out, the one with the lowest hash, and at least one is not; of a single
    one none is. Raises ``DataError`` where ``held_out`` is no share strictly between 0 and 1.
    """
    if not 0.0 < held_out < 1.0:
        raise DataError(f"held_out is {held_out}; it is a share of the text, above 0 and below 1")
    if len(names) < 2:
        return frozenset()
    ranked = sorted(names, key=_rank)
    return frozenset([ranked[0], *(name for name in ranked[1:-1] if _rank(name) < held_out)])


def held_out_cut(length: int, held_out: float) -> int:
    """Where a single file of ``length`` bytes or tokens is cut: what follows is held out, at least one of them."""
    return max(0, length - max(1, round(length * held_out)))


def split_contents(contents: dict[str, bytes], held_out: float) -> dict[str, bytes]:
    """The bytes of both splits: whole files held out by the hash of their names, a single file cut near its end."""
    held = held_out_names(contents, held_out)
    if not held:
        (content,) = contents.values()
        cut = held_out_cut(len(content), held_out)
        return {"train": content[:cut], "validation": content[cut:]}
    return {
        "train": b"".join(content for name, content in contents.items() if name not in held),
        "validation": b"".join(content for name, content in contents.items() if name in held),
    }


def digest(contents: dict[str, bytes]) -> str:
    """SHA-256 over names, sizes and contents in order: equal for equal data wherever the folder lies."""
    total = hashlib.sha256()
    for name, content in contents.items():
        total.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        total.update(content)
    return total.hexdigest()


def _rank(name: str) -> float:
    """A number in [0, 1) for a file name, the same on every machine."""
    hashed = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(hashed[:6], "big") / 2**48
