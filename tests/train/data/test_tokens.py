"""A token file gives the examples of the text that it was written from; a damaged one gives none."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.errors import DataError
from dtrain.train.data.text import ByteText
from dtrain.train.data.tokenize import tokenize
from dtrain.train.data.tokens import MANIFEST, TOKENS, TokenFile

SENTENCES = ["the cat sat on the mat\n", "a dog, a cat and a mat\n", "straße über naïve café\n"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for number in range(12):
        file = folder / ("deep" if number % 2 else "") / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SENTENCES[number % 3] * (number + 1), encoding="utf-8")
    return folder


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    tokenize(source=source, out=tmp_path / "out", held_out=0.3)
    return tmp_path / "out"


@pytest.mark.parametrize("block", [1, 8, 50])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_bytes_give_the_examples_of_the_text(source: Path, written: Path, split: str, block: int) -> None:
    text = ByteText(path=str(source), block=block, split=split, held_out=0.3)
    tokens = TokenFile(path=str(written), block=block, split=split)
    assert len(tokens) == len(text) > 0
    assert (tokens.vocab_size, tokens.tokens_per_example) == (text.vocab_size, text.tokens_per_example)
    for index in range(len(text)):
        assert tokens[index]["input"].equal(text[index]["input"])
        assert tokens[index]["target"].equal(text[index]["target"])
    with pytest.raises(IndexError):
        tokens[len(tokens)]
    with pytest.raises(IndexError):
        tokens[-1]


def test_a_single_file_gives_its_last_part(source: Path, tmp_path: Path) -> None:
    file = source / "10.txt"
    tokenize(source=file, out=tmp_path / "one", held_out=0.2)
    text = ByteText(path=str(file), block=8, split="validation", held_out=0.2)
    tokens = TokenFile(path=str(tmp_path / "one"), block=8, split="validation")
    assert [tokens[i]["input"].tolist() for i in range(len(tokens))] == [
        text[i]["input"].tolist() for i in range(len(text))
    ]


def test_it_says_what_it_wrote(source: Path, tmp_path: Path) -> None:
    said = tokenize(source=str(source), out=str(tmp_path / "deep" / "out"))
    content = (tmp_path / "deep" / "out" / TOKENS).read_bytes()
    assert json.loads(json.dumps(said)) == said
    assert said["sha256"] == hashlib.sha256(content).hexdigest()
    assert said["files"] == 12 and said["dtype"] == "uint8"
    described = TokenFile(path=str(tmp_path / "deep" / "out"), block=4).describe()
    assert json.loads(json.dumps(described))["sha256"] == said["sha256"]
    assert described["tokens"] == said["tokens"]


def craft(folder: Path, tokens: list[int], **changes: Any) -> Path:
    """A token folder written by hand, as other tools may."""
    manifest = {
        "version": 1,
        "dtype": "uint16",
        "count": len(tokens),
        "vocab_size": 60_000,
        "held_out": [[4, 8]],
        "sha256": "",
        "source": {},
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    np.array(tokens, dtype="<u2" if manifest["dtype"] == "uint16" else "<u4").tofile(folder / TOKENS)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(("dtype", "base"), [("uint16", 50_000), ("uint32", 100_000)])
def test_no_window_crosses_from_one_split_into_the_other(tmp_path: Path, dtype: str, base: int) -> None:
    tokens = [base + place for place in range(20)]
    folder = craft(
        tmp_path, tokens, dtype=dtype, vocab_size=200_000 if base > 60_000 else 60_000, held_out=[[4, 8], [13, 16]]
    )
    seen = {}
    for split in ("train", "validation"):
        data = TokenFile(path=str(folder), block=2, split=split)
        pairs = [(data[i]["input"].tolist(), data[i]["target"].tolist()) for i in range(len(data))]
        seen[split] = [[token - base for token in (*input_, target[-1])] for input_, target in pairs]
    assert seen["train"] == [[0, 1, 2], [8, 9, 10], [10, 11, 12], [16, 17, 18]]
    assert seen["validation"] == [[4, 5, 6], [13, 14, 15]]


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as refused:
        TokenFile(path=str(path), **settings)
    return str(refused.value)


def test_a_missing_folder_or_file_is_refused(tmp_path: Path, written: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing")
    (written / TOKENS).unlink()
    assert "tokens.bin': No such file" in refusal(written)


@pytest.mark.parametrize(("change", "state"), [(lambda b: b[:-1], "truncated"), (lambda b: b + b"x", "too long")])
def test_a_file_of_the_wrong_size_is_refused(written: Path, change: Callable[[bytes], bytes], state: str) -> None:
    file = written / TOKENS
    file.write_bytes(change(file.read_bytes()))
    assert f"is {state}: " in refusal(written)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "has version 2, this dtrain reads 1"),
        ({"dtype": "int8"}, "says dtype 'int8'"),
        ({"count": 0}, "of 0 tokens"),
        ({"count": "many"}, "is damaged"),
        ({"vocab_size": 70_000}, "vocab_size 70000 in uint16"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"held_out": [[8, 4]]}, "not ascending ranges"),
        ({"held_out": [[4, 8], [6, 9]]}, "not ascending ranges"),
        ({"held_out": [[18, 21]]}, "not ascending ranges"),
        ({"held_out": [4, 8]}, "is damaged"),
        ({"source": 3}, "is damaged"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(craft(tmp_path, list(range(20)), **changes), block=2)


def whole(folder: Path) -> list[list[int]]:
    """Every example, once all of the file was read."""
    found: list[list[int]] = []
    for split in ("train", "validation"):
        data = TokenFile(path=str(folder), block=8, split=split)
        data.check_content()
        found += [[len(data), data.vocab_size, *data[i]["input"].tolist()] for i in range(len(data))]
    return found


@pytest.mark.parametrize("name", [TOKENS, MANIFEST])
def test_no_flipped_bit_gives_another_example(name: str, written: Path) -> None:
    file, good = written / name, whole(written)
    content, draw = file.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            assert whole(written) == good  # white space, or what is for people
        except DataError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize("changes", [{"held_out": [[4, 9]]}, {}, {"more": 1}])
def test_a_description_that_was_edited_is_refused(changes: dict[str, Any], written: Path) -> None:
    found = json.loads((written / MANIFEST).read_text())
    (written / MANIFEST).write_text(json.dumps({**found, "vocab_size": 255, **changes}))
    refusal(written)


def test_a_vocabulary_that_is_too_small_is_refused_before_a_model_is_made(tmp_path: Path) -> None:
    folder = craft(tmp_path, list(range(100, 120)), vocab_size=119)  # by hand: without a digest or a seal
    with pytest.raises(DataError, match=r"holds the token 119, its description says vocab_size 119"):
        TokenFile(path=str(folder), block=2).check_content()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is damaged"), ("[]", "it holds a list"), ("{}", "no version"), ('{"version": 1}', "lacks dtype")],
)
def test_a_description_that_is_none_is_refused(written: Path, text: str, said: str) -> None:
    (written / MANIFEST).write_text(text)
    assert said in refusal(written)


def test_too_few_tokens_for_a_block_are_refused(tmp_path: Path) -> None:
    folder = craft(tmp_path, list(range(20)))
    assert "the validation part" in refusal(folder, block=4, split="validation")
    assert "the train part" in refusal(folder, block=12)
    nothing_held_out = craft(tmp_path / "all", list(range(20)), held_out=[])
    assert "holds 0 tokens" in refusal(nothing_held_out, block=2, split="validation")
    assert len(TokenFile(path=str(nothing_held_out), block=19)) == 1


def test_an_unknown_split_and_an_empty_block_are_refused(written: Path) -> None:
    assert "split is 'test'" in refusal(written, split="test")
    assert "block is 0" in refusal(written, block=0)


def refused_to_write(out: Path, **settings: Any) -> str:
    """The message; nothing is left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(DataError) as refused:
        tokenize(out=out, **settings)
    assert sorted(out.parent.iterdir()) == before
    return str(refused.value)


def test_an_existing_output_is_never_overwritten(source: Path, written: Path) -> None:
    content = (written / TOKENS).read_bytes()
    assert "exists already" in refused_to_write(written, source=source)
    assert (written / TOKENS).read_bytes() == content


def test_what_cannot_be_read_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "No such file" in refused_to_write(out, source=tmp_path / "missing")
    assert "held_out is 1.0" in refused_to_write(out, source=source, held_out=1.0)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "the train part" in refused_to_write(out, source=empty)
    (source / "zz.txt").symlink_to("nowhere")
    assert "zz.txt" in refused_to_write(out, source=source)


def test_an_output_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*Not a directory"):
        tokenize(source=source, out=tmp_path / "file" / "out")


def test_a_missing_package_names_the_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    said = refused_to_write(tmp_path / "out", source=source, tokenizer=str(tmp_path / "tokenizer.json"))
    assert "pip install 'dtrain[text]'" in said
    assert "No such file" in refused_to_write(tmp_path / "out", source=source, tokenizer="missing.json")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A word-level tokenizer.json whose ids have a gap, stored with truncation and padding as inference wants them."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["the", "a", "cat", "dog", "mat", "sat", "on", "and", ",", "straße", "über", "naïve", "café"]
    vocabulary = {"<unk>": 0} | {word: 299 - number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(4)
    made.enable_padding(length=4)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_file_encodes_every_file_whole(source: Path, tmp_path: Path, tokenizer: Path) -> None:
    said = tokenize(source=source, out=tmp_path / "out", tokenizer=str(tokenizer), held_out=0.3)
    assert said["vocab_size"] == 300 and said["dtype"] == "uint16"
    words = sum(len(SENTENCES[number % 3].replace(",", " ,").split()) * (number + 1) for number in range(12))
    described = TokenFile(path=str(tmp_path / "out"), block=2).describe()
    assert described["count"] == words
    first = TokenFile(path=str(tmp_path / "out"), block=6)[0]["input"].tolist()
    assert len(first) == 6 and all(287 <= token < 300 for token in first)


def test_text_that_is_not_utf8_is_refused_by_name(source: Path, tmp_path: Path, tokenizer: Path) -> None:
    (source / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "'latin.txt' is not UTF-8" in refused_to_write(tmp_path / "out", source=source, tokenizer=str(tokenizer))


def test_a_file_that_is_no_tokenizer_is_refused(source: Path, tmp_path: Path, tokenizer: Path) -> None:
    tokenizer.write_text("{}")
    assert "is no tokenizer.json" in refused_to_write(tmp_path / "out", source=source, tokenizer=str(tokenizer))
