"""Counts the bytes of all tensors that are alive, op by op, under FakeTensorMode or with real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dtrain.comm.torch_private import TorchDispatchMode, is_traceable_wrapper_subclass, tree_leaves


class Storages(TorchDispatchMode):
    """Within the mode: ``live`` and ``peak``, the bytes of what ops of this thread have allocated, now and at most.

    What existed before counts once `adopt` has seen it, or never where `ignore` has. ``on_op``: called after each op
    with the op, its arguments and its result.
    """

    def __init__(self, on_op: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.live = self.peak = 0
        self._sizes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._on_op = on_op

    def ignore(self, tensors: Iterable[Tensor]) -> int:
        """Stop counting these; returns the bytes that were counted for them."""
        before = self.live
        for storage in _storages(tensors):
            self.live -= self._counted(storage)
            self._sizes[storage] = [0, False]
        return before - self.live

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count these, too."""
        for storage in _storages(tensors):
            self._count(storage)

    def begin(self) -> None:
        """Measure ``peak`` from now on."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            self._count(storage)
        self.peak = max(self.peak, self.live)
        if self._on_op is not None:
            self._on_op(func, args, kwargs or {}, result)
        return result

    def _counted(self, storage: torch.UntypedStorage) -> int:
        size, counts = self._sizes.get(storage, (0, True))
        return size if counts else 0

    def _count(self, storage: torch.UntypedStorage) -> None:
        entry = self._sizes.get(storage)
        if entry is None:
            entry = self._sizes[storage] = [0, True]
            weakref.finalize(storage, self._freed, entry)
        if entry[1] and entry[0] != storage.nbytes():  # an op may have resized it
            self.live += storage.nbytes() - entry[0]
            entry[0] = storage.nbytes()

    def _freed(self, entry: list[int]) -> None:
        if entry[1]:
            self.live -= entry[0]


def _storages(tensors: Iterable[Tensor]) -> Iterable[torch.UntypedStorage]:
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _storages(getattr(tensor, name) for name in names)
        elif tensor.layout == torch.strided:
            yield tensor.untyped_storage()
