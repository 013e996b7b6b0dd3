"""Files of values and tensors: exactly what was written, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing._internal.two_tensor import TwoTensor

from dtrain.comm.tensor_file import DTYPES, DamagedFile, read, write

VALUE = {
    "numbers": [1, -(2**60), 0.1, float("inf"), True, None, "text"], 3: ({"empty": torch.empty(0, 4)}, ()),
    "tensors": {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES}, "count": torch.tensor(5.0),
}  # fmt: skip


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a", VALUE)
    found = read(tmp_path / "a")
    assert repr(found) == repr(VALUE)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_tools_can_read_the_tensors(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(2, 3)})
    with safe_open(tmp_path / "a", "pt") as file:
        assert torch.equal(file.get_tensor("0"), torch.ones(2, 3))


def test_tensors_that_share_memory_or_are_views_are_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    write(tmp_path / "a", [base.t(), base[:, 1], base])
    found = read(tmp_path / "a")
    assert isinstance(found, list) and all(map(torch.equal, found, [base.t(), base[:, 1], base]))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, {2, 3}]}, "a.1 is a set"),
        ({"a": {1.5: 2}}, "a has the key 1.5"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a is a tensor of torch.complex64"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_left(tmp_path: Path, value: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        write(tmp_path / "a", value)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_keeps_its_numbers_in_others_is_refused_with_the_way_out(tmp_path: Path) -> None:
    quantized = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match=r"optimizer\.state\.0\.exp_avg is a TwoTensor.*torch\.save"):
        write(tmp_path / "a.safetensors", {"optimizer": {"state": {0: {"exp_avg": quantized}}}})
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, {"w": torch.arange(5), "n": 1})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x11]) + content[place + 1 :])
        with pytest.raises(DamagedFile):
            read(path)
        path.write_bytes(content[:place])
        with pytest.raises(DamagedFile):
            read(path)
