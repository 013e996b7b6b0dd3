"""The repeated blocks of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the members of its module lists, outermost only. May be empty."""

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if isinstance(module, nn.ModuleList):
            yield from module
            return
        for child in module.children():
            yield from walk(child)

    return list(walk(model))
