"""Optimizers that hold other parameters for evaluation than for training, such as schedule-free ones.

They swap what the model holds in ``train()`` and ``eval()``, by what they keep beside it, and know by a flag which of
the two it is. Where the model's parameters are put back from elsewhere, the flag has to follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def mode_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Behind it the optimizer is in the mode in which it was found, whatever the model then holds."""
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
    """All that may say in which mode it is: wherever optimizers keep it, it is no number."""
    kept = [vars(optimizer), *optimizer.param_groups]
    return [{name: value for name, value in one.items() if isinstance(value, bool | str)} for one in kept]
