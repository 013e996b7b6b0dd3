"""Turn a folder of text files into a token file, once, before training; ``dtrain.train.data.tokens`` has the format."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dtrain.errors import DataError
from dtrain.train.data.text import VOCAB_SIZE, find_files, held_out_cut, held_out_names, read_file
from dtrain.train.data.tokens import DTYPES, MANIFEST, TOKENS, VERSION, Manifest

# The name of a file and its bytes, to its tokens.
Encode = Callable[[str, bytes], npt.NDArray[np.unsignedinteger]]


def tokenize(
    *, source: str | Path, out: str | Path, tokenizer: str = "bytes", held_out: float = 0.05
) -> dict[str, object]:
    """Write the tokens of the text files in ``source`` (a folder or a file) to the new folder ``out``; describe it.

    ``tokenizer`` is "bytes" or the path of a ``tokenizer.json`` of the package ``tokenizers``. Files are joined in the
    order of their names without tokens between them, the held-out ones, chosen as ``ByteText`` does, at the end. One
    file at a time is in memory. ``out`` appears complete or not at all. Returns the manifest without the list of files;
    raises ``DataError`` where ``out`` exists, the text or the tokenizer cannot be read, or a split would be empty.
    """
    target = Path(out).expanduser()
    if os.path.lexists(target):
        raise DataError(f"{str(target)!r} exists already; remove it or give another out")
    files = find_files(source)
    held = held_out_names(files, held_out)
    vocab_size, encode, described = _load(tokenizer)
    temporary = target.parent / f".{target.name}.writing-{os.getpid()}"
    sizes: dict[str, int] = {}  # bytes by name; filled while the files are read

    def tokens_of(name: str) -> npt.NDArray[np.unsignedinteger]:
        content = read_file(files[name])
        sizes[name] = len(content)
        return encode(name, content)

    try:
        temporary.mkdir(parents=True)
        manifest = _write(
            temporary / TOKENS,
            _splits(list(files), held, held_out, tokens_of),
            vocab_size=vocab_size,
            source={"root": str(Path(source).expanduser()), "tokenizer": described, "files": sizes},
        )
        _save(temporary / MANIFEST, manifest.to_json().encode())
        os.rename(temporary, target)
    except OSError as error:
        raise DataError(f"cannot write {str(target)!r}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "out": str(target),
        "tokens": {"train": manifest.held_out[0][0], "validation": manifest.count - manifest.held_out[0][0]},
        "vocab_size": vocab_size,
        "dtype": manifest.dtype,
        "files": len(files),
        "sha256": manifest.sha256,
    }


def _splits(
    names: list[str],
    held: frozenset[str],
    held_out: float,
    tokens_of: Callable[[str], npt.NDArray[np.unsignedinteger]],
) -> Iterator[tuple[str, npt.NDArray[np.unsignedinteger]]]:
    """Pairs of split and tokens: all of "train" first."""
    if not held:
        (name,) = names
        # Cut between tokens: between bytes the cut could fall within a character.
        tokens = tokens_of(name)
        cut = held_out_cut(len(tokens), held_out)
        yield "train", tokens[:cut]
        yield "validation", tokens[cut:]
        return
    for split in ("train", "validation"):
        for name in names:
            if (name in held) == (split == "validation"):
                yield split, tokens_of(name)


def _write(
    file: Path,
    pieces: Iterator[tuple[str, npt.NDArray[np.unsignedinteger]]],
    *,
    vocab_size: int,
    source: dict[str, object],
) -> Manifest:
    dtype = next(name for name in DTYPES if vocab_size <= np.iinfo(DTYPES[name]).max + 1)
    counts = {"train": 0, "validation": 0}
    digest = hashlib.sha256()
    with file.open("xb") as stream:
        for split, tokens in pieces:
            content = tokens.astype(DTYPES[dtype]).tobytes()
            digest.update(content)
            stream.write(content)
            counts[split] += len(tokens)
        stream.flush()
        os.fsync(stream.fileno())
    for split, count in counts.items():
        if not count:
            raise DataError(f"the {split} part of {source['root']!r} would be empty; give more text")
    total = sum(counts.values())
    return Manifest(
        version=VERSION,
        dtype=dtype,
        count=total,
        vocab_size=vocab_size,
        held_out=((counts["train"], total),),
        sha256=digest.hexdigest(),
        source=source,
    )


def _save(file: Path, content: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _load(tokenizer: str) -> tuple[int, Encode, dict[str, str]]:
    """Vocabulary size, the function from bytes to tokens, and what identifies the tokenizer."""
    if tokenizer == "bytes":
        return VOCAB_SIZE, lambda _, content: np.frombuffer(content, dtype=np.uint8), {"name": "bytes"}
    file = Path(tokenizer).expanduser()
    content = read_file(file)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            f"the tokenizer {tokenizer!r} needs the package `tokenizers`: pip install 'dtrain[text]', "
            "or take tokenizer=bytes"
        ) from error
    try:
        loaded = Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises bare Exception for a file that it cannot parse
        raise DataError(f"{tokenizer!r} is no tokenizer.json of the package `tokenizers`: {error}") from error
    # Truncation or padding stored for inference would cut every file to a few hundred tokens.
    loaded.no_truncation()
    loaded.no_padding()

    def encode(name: str, content: bytes) -> npt.NDArray[np.unsignedinteger]:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name!r} is not UTF-8 text ({error}); convert it or take tokenizer=bytes") from error
        return np.asarray(loaded.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    # Not get_vocab_size(): ids may have gaps, and a model needs a row for the highest one.
    vocab_size = 1 + max(loaded.get_vocab(with_added_tokens=True).values(), default=0)
    return vocab_size, encode, {"name": str(file), "sha256": hashlib.sha256(content).hexdigest()}
