"""Weights to start from, or to compare with: an exported file, a checkpoint, or a run that has ended."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.errors import CheckpointError
from dtrain.train.checkpoint import tensors
from dtrain.train.checkpoint.export import digest, full_buffers, full_parameters
from dtrain.train.checkpoint.finite import all_finite
from dtrain.train.checkpoint.folders import step_folders
from dtrain.train.checkpoint.read import verify

EXPORTED = Path("export") / "model.safetensors"


def weights_of(path: Path, parameters: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors by name. ``path``: a safetensors file, a checkpoint (RUN/checkpoints/step-N), or a run with an export.

    Persistent buffers are among them. Stored digests are verified: the CRC-32 of a checkpoint's files, the digests in
    an export. ``parameters``: which of the names are parameters, the others being buffers; all of them by default.

    Raises CheckpointError for anything else, for damage, and for parameters that are NaN or Inf.
    """
    file = path / EXPORTED if (path / EXPORTED).exists() else path
    if file.is_dir():
        if steps := step_folders(file / "checkpoints"):
            raise CheckpointError(f"{path} has no {EXPORTED}, since it has not ended; give a checkpoint: {steps[-1]}")
        verify(file)
        return full_buffers(file) | full_parameters(file)
    stored, metadata = tensors.load(file)
    selected = {name: tensor for name, tensor in stored.items() if parameters is None or name in parameters}
    recorded = metadata.get(tensors.PARAMETERS_DIGEST)
    if tensors.META in metadata and not recorded and tensors.DIGEST not in metadata:
        raise CheckpointError(f"{file} is an export of dtrain without its digest: it is damaged, so take another copy")
    # With all names in its metadata damaged, an export would pass for another program's file.
    digests = (tensors.DIGEST, tensors.PARAMETERS_DIGEST)
    if damaged := [name for name in metadata if name not in digests and get_close_matches(name, digests, cutoff=0.8)]:
        raise CheckpointError(f"{file} has a digest under the name {damaged[0]!r}: it is damaged, so take another copy")
    # Exports of earlier versions have only this digest, which does not cover buffers.
    if recorded and tensors.DIGEST not in metadata and recorded != digest(selected):
        raise CheckpointError(
            f"{file} does not hold the parameters that it was written with: their digest was {recorded[:16]}..., and "
            f"is {digest(selected)[:16]}...; it is damaged, or they are another model's"
        )
    if bad := [name for name, tensor in selected.items() if not all_finite(tensor)]:
        raise CheckpointError(f"{file}: {bad[0]} holds NaN or Inf ({len(bad)} tensors do); nothing can begin with that")
    return stored


def put_into(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copy ``weights`` into ``model``; buffers and frozen parameters that they lack stay as they are.

    Raises CheckpointError where they belong to another model.
    """
    parameters = dict(model.named_parameters())
    buffers, names = dict(model.named_buffers()), model.state_dict(keep_vars=True).keys()
    problems = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'} there, {tuple(p.shape)} in the model"
        for name, p in parameters.items()
        if (name in weights or p.requires_grad) and (name not in weights or weights[name].shape != p.shape)
    ]
    problems += [f"the model has no {name}" for name in weights if name not in names]
    if problems:
        listed = "; ".join(problems[:3])
        raise CheckpointError(f"{where} holds weights of another model: {listed} ({len(problems)} in all)")
    with torch.no_grad():
        for name, tensor in (parameters | buffers).items():
            if name in weights:
                tensor.copy_(weights[name])
