"""Weights to start from: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dtrain.checkpoint.weights import put_into, weights_of
from dtrain.config import compose
from dtrain.config.validating import validate
from dtrain.errors import CheckpointError, ConfigError


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
