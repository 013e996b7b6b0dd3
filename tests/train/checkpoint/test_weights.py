"""Weights to start from: what is read, and what is refused."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dtrain.errors import CheckpointError, ConfigError
from dtrain.train.checkpoint import export, full_parameters, tensors
from dtrain.train.checkpoint.export import digest, full_buffers
from dtrain.train.checkpoint.weights import put_into, weights_of
from dtrain.train.config import compose
from dtrain.train.config.validation import validate


class Tied(nn.Module):
    """Two names for one parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(2))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in (*model.named_parameters(), *model.named_buffers())}


def test_what_was_exported_is_what_a_model_begins_with(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, other = Tied(), Tied()
    other.get_buffer("seen").fill_(7)
    save_file(values(other), tmp_path / "model.safetensors")
    put_into(model, weights_of(tmp_path / "model.safetensors"), "here")
    for name, value in values(other).items():
        assert torch.equal(values(model)[name], value), name
    without = {name: value for name, value in values(other).items() if name != "seen"}
    put_into(Tied(), {**without, "last.weight": other.last.weight.detach()}, "here")  # both names of what is tied


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first.weight": torch.zeros(3, 4)}, r"first.weight is \(3, 4\) there, \(3, 3\) in the model"),
        ({"third.weight": torch.zeros(1)}, "the model has no third.weight"),
        ({"first.bias": None}, "first.bias is missing there"),
    ],
    ids=["shape", "too many", "missing"],
)
def test_weights_of_another_model(change: dict[str, Tensor | None], said: str) -> None:
    given = {name: tensor for name, tensor in {**values(Tied()), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"x.safetensors holds weights of another model: {said}"):
        put_into(Tied(), given, "x.safetensors")


def test_they_are_looked_at_before_anything_is_launched(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    base = [f"run.dir={tmp_path / 'run'}", "engine=ddp"]
    with pytest.raises(ConfigError, match=r"run\.weights=.*other\.safetensors holds weights of another model"):
        validate(compose([*base, f"run.weights={tmp_path / 'other.safetensors'}"]))
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        validate(compose([*base, f"run.weights={tmp_path / 'nothing'}"]))


# ---- what stands beside weights is compared with them --------------------------------------------------------------


def flipped(path: Path, at: int, bit: int) -> Path:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    (path.parent / "flipped").write_bytes(content)
    return path.parent / "flipped"


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("older", [False, True], ids=["with a digest of all", "of an earlier version"])
def test_no_flipped_bit_of_an_export_gets_into_a_model(older: bool, save: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "export" / "model.safetensors"
    export(save(1), file)
    good, names = weights_of(tmp_path), ["a.weight", "b.bias"]
    assert "bn.mean" in good
    if older:
        kept = {"format": "pt", "step": "1", "parameters_digest": digest({name: good[name] for name in names})}
        save_file(good, file, kept)
    draw, size = random.Random(1), file.stat().st_size
    refused = 0
    for _ in range(400):
        try:
            found = weights_of(flipped(file, draw.randrange(size), draw.randrange(8)), names)
        except CheckpointError:
            refused += 1
            continue
        assert all(torch.equal(found[name], good[name]) for name in names)
        assert older or equal(found, good)
    assert refused > 100


def test_an_export_whose_digests_are_unreadable_is_damaged(save: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "export" / "model.safetensors"
    export(save(1), file)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"tensors_digest", b"tensors?digest").replace(b"parameters_d", b"parameters?d"))
    with pytest.raises(CheckpointError, match="an export of dtrain without its digest"):
        weights_of(tmp_path)
    file.write_bytes(content.replace(b"tensors_digest", b"tensors?digest").replace(b"parameters_d", b"parameters?d")
                     .replace(b"\"meta\"", b"\"mgta\""))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"a digest under the name '(tensors|parameters)\?digest'"):
        weights_of(tmp_path)


def test_no_flipped_bit_of_a_checkpoint_gets_into_a_model(save: Callable[..., Path]) -> None:
    path = save(1)
    good = {**full_parameters(path), **full_buffers(path)}
    assert equal(weights_of(path), good) and "bn.mean" in good  # statistics of BatchNorm, beside the parameters
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        flipped(file, len(content) - 3, 4).rename(file)
        with pytest.raises(CheckpointError, match=r"CRC-32"):
            weights_of(path)
        file.write_bytes(content)


def test_a_run_that_has_not_ended_names_its_checkpoint(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=rf"has not ended; give a checkpoint: .*{path.name}"):
        weights_of(tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_begins_with_nan(value: float, tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, value]), "mask": torch.tensor([-float("inf")])}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="w holds NaN or Inf"):
        weights_of(tmp_path / "w.safetensors", ["w"])
    assert weights_of(tmp_path / "w.safetensors", [])  # a buffer may hold what it likes


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_rights_that_the_umask_gives(umask: int, save: Callable[..., Path], tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        path = save(1)
        export(path, tmp_path / "out" / "model.safetensors")
    finally:
        os.umask(old)
    files = [file for file in (*path.iterdir(), *(tmp_path / "out").iterdir()) if file.is_file()]
    assert len(files) == 10
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x.safetensors") as raised:
        tensors.save(tmp_path / "x.safetensors", {})
    assert raised.value.errno == errno.ENOSPC


def test_frozen_parameters_that_weights_lack_stay_as_they_are() -> None:
    base, adapter = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"base": base.requires_grad_(False), "adapter": adapter})
    before = base.weight.clone()
    put_into(model, {"adapter.weight": torch.ones(2, 2)}, "here")
    assert torch.equal(base.weight, before) and torch.equal(adapter.weight, torch.ones(2, 2))
    with pytest.raises(CheckpointError, match=r"adapter\.weight is missing there"):
        put_into(model, {"base.weight": torch.ones(2, 2)}, "here")
