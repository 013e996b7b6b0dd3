"""Optimizers with other parameters for evaluation than for training, such as schedule-free ones.

Their ``train()`` and ``eval()`` swap the model's parameters, and set a flag. Where the model's parameters are restored
from elsewhere, the flag has to follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def mode_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore the optimizer's mode at the end, whatever the model then holds."""
    modes = [getattr(optimizer, name, None) for name in ("train", "eval")]
    if not all(callable(mode) for mode in modes):
        yield
        return
    before = _flags(optimizer)
    try:
        yield
    finally:
        for mode in modes:
            if callable(mode) and _flags(optimizer) != before:
                mode()


def _flags(optimizer: torch.optim.Optimizer) -> list[dict[str, bool | str]]:
    """All booleans and texts of an optimizer: wherever it keeps its mode, it is one of them."""
    fields = [vars(optimizer), *optimizer.param_groups]
    return [{name: value for name, value in group.items() if isinstance(value, bool | str)} for group in fields]
