"""Notices a backward pass within DDP's no_sync() that no exchanged one has followed: its gradient is a replica's own.

Within the context nothing is hooked; what it leaves behind is compared with what it found: one number per parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Unsynced:
    """Takes the place of ``model.no_sync`` until `remove`. ``pending``: something was added since the last exchange."""

    def __init__(self, model: DistributedDataParallel, parameters: Collection[Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self.pending, self._exchanges = False, 0
        model.__dict__["no_sync"] = self._no_sync

    def exchanged(self) -> None:
        """A backward pass was exchanged, with all that had been added before."""
        self.pending, self._exchanges = False, self._exchanges + 1

    def step_ended(self) -> None:
        self.pending = False

    def remove(self) -> None:
        self.model.__dict__.pop("no_sync", None)

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        exchanges, before = self._exchanges, self._versions()
        with DistributedDataParallel.no_sync(self.model):
            yield
        if exchanges == self._exchanges and self._versions() != before:
            self.pending = True

    def _versions(self) -> list[tuple[int, int] | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]
