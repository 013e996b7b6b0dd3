"""Both splits together are the text, nothing is in both, and what cannot be read is said before training starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import DataError
from dtrain.train.data.text import ByteText, find_files, held_out_cut, held_out_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of 100 bytes each, in two levels, and three that are not text."""
    for number in range(40):
        file = tmp_path / "texts" / ("deep" if number % 2 else "") / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * 100)
    (tmp_path / "texts" / "image.png").write_bytes(b"x" * 100)
    (tmp_path / "texts" / "__pycache__").mkdir()
    (tmp_path / "texts" / "__pycache__" / "cached.txt").write_bytes(b"x" * 100)
    return tmp_path / "texts"


def tokens_of(data: ByteText) -> list[int]:
    """All tokens that the windows cover, in order."""
    examples = [data[index] for index in range(len(data))]
    return [*examples[0]["input"][:1].tolist(), *torch.cat([example["target"] for example in examples]).tolist()]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("block", [1, 7, 99])
def test_the_windows_are_the_text(folder: Path, split: str, block: int) -> None:
    data = ByteText(path=str(folder), block=block, split=split, held_out=0.2)
    held = held_out_names([file.relative_to(folder).as_posix() for file in folder.rglob("[0-9]*.txt")], 0.2)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("[0-9]*.txt"))
    text = b"".join((folder / name).read_bytes() for name in names if (name in held) == (split == "validation"))
    covered = tokens_of(data)
    assert covered == list(text[: len(covered)])
    assert len(text) - len(covered) < block
    for index in range(len(data)):
        example = data[index]
        assert example["input"].dtype == example["target"].dtype == torch.int64
        assert example["input"].shape == example["target"].shape == (block,)
        assert example["input"][1:].equal(example["target"][:-1])


def test_no_file_is_in_both_splits(folder: Path) -> None:
    parts = [
        set(tokens_of(ByteText(path=str(folder), block=50, split=s, held_out=0.3))) for s in ("train", "validation")
    ]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(40))


def test_iteration_ends(folder: Path) -> None:
    data = ByteText(path=str(folder), held_out=0.3)
    with pytest.raises(IndexError, match=f"example {len(data)} of {len(data)}"):
        data[len(data)]
    with pytest.raises(IndexError, match="example -1"):
        data[-1]
    assert len(list(data)) == len(data)  # type: ignore[call-overload]


NAMES = st.sets(st.text(min_size=1, max_size=6), min_size=2, max_size=40)


@given(NAMES, st.floats(0.01, 0.99))
def test_some_files_are_held_out_and_some_are_not(names: set[str], held_out: float) -> None:
    held = held_out_names(names, held_out)
    assert 0 < len(held) < len(names)
    assert held <= names
    assert held <= held_out_names(names, 0.995)


def test_a_new_file_moves_no_other() -> None:
    names = [f"{number}.txt" for number in range(200)]
    held = held_out_names(names, 0.1)
    assert 8 <= len(held) <= 32  # binomial, 20 expected
    for new in range(200, 240):
        assert held_out_names([*names, f"{new}.txt"], 0.1) - {f"{new}.txt"} == held


@given(st.integers(0, 10_000), st.floats(0.001, 0.999))
def test_the_cut_of_a_single_file_holds_out_its_share(length: int, held_out: float) -> None:
    cut = held_out_cut(length, held_out)
    assert 0 <= cut <= length
    assert abs(length - cut - length * held_out) <= 1


def test_a_single_file_gives_its_last_part(tmp_path: Path) -> None:
    file = tmp_path / "novel"
    file.write_bytes(bytes(range(200)))
    train = ByteText(path=str(file), block=10, held_out=0.25)
    validation = ByteText(path=str(file), block=10, held_out=0.25, split="validation")
    assert tokens_of(train) == list(range(141))
    assert tokens_of(validation) == list(range(150, 191))
    assert ByteText(path=str(tmp_path), block=10, suffixes=["novel"], held_out=0.25)[3]["input"][0] == 30


def test_the_description_identifies_the_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = ByteText(path=str(folder), block=10).describe()
    moved = folder.rename(tmp_path / "moved")
    second = ByteText(path=str(moved), block=10, split="validation").describe()
    assert json.loads(json.dumps(first)) == first
    assert first["root"] == str(folder) and second["root"] == str(moved)
    assert first["sha256"] == second["sha256"]
    assert first["files"] == second["files"] and first["bytes"] == second["bytes"]
    files, sizes = first["files"], first["bytes"]
    assert isinstance(files, dict) and isinstance(sizes, dict)
    assert files == dict.fromkeys(sorted(files), 100) and len(files) == 40
    assert sizes["train"] + sizes["validation"] == 4000
    (moved / "00.txt").write_bytes(b"y" * 100)
    assert ByteText(path=str(moved), block=10).describe()["sha256"] != first["sha256"]


def test_the_default_is_the_source_of_the_standard_library() -> None:
    data = ByteText()
    description = data.describe()
    files = description["files"]
    assert isinstance(files, dict)
    assert {"os.py", "json/decoder.py"} <= set(files)
    assert not [name for name in files if {"test", "tests", "site-packages", "__pycache__"} & set(name.split("/"))]
    assert data.vocab_size == 256 and data.tokens_per_example == 128
    assert len(data) > 10_000 and len(ByteText(split="validation")) > 500


def refusal(**settings: object) -> str:
    with pytest.raises(DataError) as refused:
        ByteText(**settings)  # type: ignore[arg-type]
    return str(refused.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(path=str(tmp_path / "missing"))
    assert "path of the text is empty" in refusal(path="")


def test_a_folder_without_a_matching_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"x")
    assert "ends in .py or .txt or .md" in refusal(path=str(tmp_path))
    assert "no suffixes" in refusal(path=str(tmp_path), suffixes=[])


def test_suffixes_written_as_one_text_are_refused(folder: Path) -> None:
    assert "give a list: ['.txt']" in refusal(path=str(folder), suffixes=".txt")


def test_too_little_text_is_refused_for_each_split(folder: Path, tmp_path: Path) -> None:
    assert "the train part" in refusal(path=str(folder), block=4000)
    small = tmp_path / "small.txt"
    small.write_bytes(b"a" * 200)
    assert "the validation part" in refusal(path=str(small), block=10, held_out=0.05)
    assert "holds 10 bytes, and one example takes 11" in refusal(path=str(small), block=10, held_out=0.05)
    ByteText(path=str(small), block=9, held_out=0.05)
    small.write_bytes(b"")
    assert "the train part" in refusal(path=str(small))


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(folder: Path, held_out: float) -> None:
    assert f"held_out is {held_out}" in refusal(path=str(folder), held_out=held_out)


def test_an_unknown_split_and_an_empty_block_are_refused(folder: Path) -> None:
    assert "split is 'test'" in refusal(path=str(folder), split="test")
    assert "block is 0" in refusal(path=str(folder), block=0)


def test_files_that_cannot_be_read_are_refused_by_name(folder: Path) -> None:
    link = folder / "broken.txt"
    link.symlink_to(folder / "nowhere")
    assert "broken.txt" in refusal(path=str(folder))
    link.unlink()
    os.mkfifo(folder / "pipe.txt")
    assert "pipe.txt' is not a regular file" in refusal(path=str(folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission_are_refused_by_name(folder: Path) -> None:
    (folder / "00.txt").chmod(0)
    assert "00.txt': Permission denied" in refusal(path=str(folder))


def test_hidden_folders_are_left_out(tmp_path: Path) -> None:
    for name in (".git/a.py", ".venv/lib/b.py", "c.py", "d/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 400)
    assert sorted(find_files(tmp_path)) == ["c.py", "d/e.py"]
