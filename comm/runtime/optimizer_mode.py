"""Optimizers with other parameters for evaluation than for training, such as schedule-free ones.

Their ``train()`` and ``eval()`` swap the model's parameters, and set a flag. Where the model's parameters are restored
from elsewhere, the flag has to follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dtrain.comm.inner_optimizers.chained import with_members


@contextmanager
def mode_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore the mode of the optimizer, and of all where it is several, at the end, whatever the model then holds."""
    before = [(one, _flags(one)) for one in with_members(optimizer) if _modes(one)]
    try:
        yield
    finally:
        for one, flags in before:
            for mode in _modes(one):
                if _flags(one) != flags:
                    mode()


def _modes(optimizer: torch.optim.Optimizer) -> list[Callable[[], object]]:
    """Its ``train()`` and ``eval()``; empty unless it has both."""
    modes = [getattr(optimizer, name, None) for name in ("train", "eval")]
    return [mode for mode in modes if callable(mode)] if all(map(callable, modes)) else []


def _flags(optimizer: torch.optim.Optimizer) -> list[dict[str, bool | str]]:
    """All booleans and texts of an optimizer: wherever it keeps its mode, it is one of them."""
    fields = [vars(optimizer), *optimizer.param_groups]
    return [{name: value for name, value in group.items() if isinstance(value, bool | str)} for group in fields]
