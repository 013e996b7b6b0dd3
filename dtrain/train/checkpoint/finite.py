"""Whether a checkpoint's content is finite: a run that resumes from a NaN has lost all earlier work.

Checked are parameters, optimizer state and sync state of every rank. Buffers are not: a mask may hold -inf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.errors import CheckpointError
from dtrain.train.checkpoint.manifest import Manifest
from dtrain.train.checkpoint.state import BUFFERS, OPAQUE, RNG, SEPARATOR, RankState


def first_not_finite(state: RankState) -> tuple[str, str] | None:
    """(section, name) of the first tensor of ``state`` that holds NaN or Inf, in the order of both; None if none does.

    >>> from dtrain.comm.layout import Segment
    >>> held = {"w": torch.tensor([1.0, float("nan")])}
    >>> first_not_finite(RankState({"w": Segment("w", 0, 2)}, {"parameters": held}, {"parameters": "replicated"}))
    ('parameters', 'w')
    """
    return next(((section, name) for section, name, tensor in _tensors(state) if not all_finite(tensor)), None)


def all_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, as integers are; allocates no second tensor of that size.

    >>> all_finite(torch.tensor([1.0, float("-inf")])), all_finite(torch.empty(0)), all_finite(torch.tensor([7]))
    (False, True, True)
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # eight bits have no aminmax
        tensor = tensor.float()
    return all(bool(edge.isfinite()) for edge in torch.aminmax(tensor))


def check_finite(path: Path, manifest: Manifest) -> None:
    """Raise CheckpointError, naming the file and the tensor, where a committed checkpoint holds NaN or Inf."""
    for file in manifest.files:
        try:
            with safe_open(path / file.name, framework="pt") as opened:
                for key in sorted(opened.keys()):
                    section, _, name = key.partition(SEPARATOR)
                    if section not in (RNG, BUFFERS) and not all_finite(opened.get_tensor(key)):
                        raise CheckpointError(
                            f"{path / file.name}: {section} of {name} holds NaN or Inf: it was written after training "
                            "had broken down"
                        )
        except SafetensorError as error:
            raise CheckpointError(f"{path / file.name} cannot be read: {error}") from error


def _tensors(state: RankState) -> Iterator[tuple[str, str, Tensor]]:
    sections: Mapping[str, Mapping[str, Tensor]] = {**state.sections, OPAQUE: state.opaque}
    for section in sorted(sections):
        for name in sorted(sections[section]):
            yield section, name, sections[section][name]
