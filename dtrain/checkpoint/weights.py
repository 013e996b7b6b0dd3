"""Weights to start from, or to compare with: an exported file, a checkpoint, or a run that has ended."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dtrain.checkpoint.export import full_parameters
from dtrain.errors import CheckpointError

EXPORTED = Path("export") / "model.safetensors"


def weights_of(path: Path) -> dict[str, Tensor]:
    """Tensors by name. ``path``: a safetensors file, a checkpoint (RUN/checkpoints/step-N), or a run with an export.

    Raises CheckpointError for what is none of them.
    """
    file = path / EXPORTED if (path / EXPORTED).exists() else path
    if file.is_dir():
        return full_parameters(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def put_into(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copy ``weights`` into ``model``; what the model has of buffers and they have not stays.

    Raises CheckpointError where they are of another model.
    """
    own = dict(model.named_parameters())
    buffers, known = dict(model.named_buffers()), model.state_dict(keep_vars=True).keys()
    wrong = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'} there, {tuple(p.shape)} in the model"
        for name, p in own.items()
        if name not in weights or weights[name].shape != p.shape
    ]
    wrong += [f"the model has no {name}" for name in weights if name not in known]
    if wrong:
        raise CheckpointError(f"{where} holds weights of another model: {'; '.join(wrong[:3])} ({len(wrong)} in all)")
    with torch.no_grad():
        for name, tensor in (own | buffers).items():
            if name in weights:
                tensor.copy_(weights[name])
