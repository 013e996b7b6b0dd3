"""The outer state of a local update in host memory: on the device only while a fragment's round begins or ends.

    host (pinned):   anchor, outer momentum
    a step ahead of a fragment's round:     to the device, overlapping that step, on a separate stream
    after it:                               back, on the same stream

Bit-identical to the replicated store, with the same bytes on the links. For GPUs; on CPUs it costs copies and saves
nothing. Streaming DiLoCo (arXiv:2501.18512) assumes it: when each fragment will be needed is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dtrain.comm.layout import Named
from dtrain.comm.outer_optimizers import OuterOptimizer, Round
from dtrain.comm.runtime.consistency import Held
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.outer_store.store import PseudoGradients, ReplicatedStore
from dtrain.comm.runtime.rounds import Fragment
from dtrain.comm.state import State


class OffloadedStore:
    """A replicated store whose tensors are in host memory while they are not needed."""

    whole = True

    def __init__(self, context: Context, outer: OuterOptimizer) -> None:
        self._state = context.state
        self._replicated = ReplicatedStore(context, outer)
        self._names = {"anchor", *outer.kinds}
        self._host: dict[tuple[str, str], Tensor] = {}
        self._ahead: dict[tuple[str, str], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        """On the device, while the caller keeps the tensors."""
        anchors = self._replicated.anchor(fqns)
        copies = self._copies(anchors, ["anchor"])
        self._wait_for(copies.values())
        return {fqn: copies.get((fqn, "anchor"), anchor) for fqn, anchor in anchors.items()}

    def set_anchor(self, values: Named) -> None:
        self._replicated.set_anchor(values)
        self.rest()

    def pseudo_gradients(self, fqns: Collection[str]) -> PseudoGradients:
        self._fetch(fqns)
        return self._replicated.pseudo_gradients(fqns)

    def branch(self) -> State:
        return self._replicated.branch()

    def apply(self, fragment: Fragment, values: Named, now: Round) -> dict[str, Tensor] | None:
        self._fetch(fragment.fqns)
        return self._replicated.apply(fragment, values, now)

    def held(self, fresh: Collection[str], *, together: bool) -> Held:
        """Without copies: host tensors are compared where they are."""
        if self._stream is not None:
            self._stream.synchronize()
        yield from self._replicated.held(fresh, together=together)

    def ahead(self, fqns: Iterable[str]) -> None:
        self._ahead |= self._copies(fqns)

    def rest(self) -> None:
        """Move the outer state to the host."""
        self._ahead = {}
        for fqn, named in self._state.tensors.items():
            for name in self._names & named.keys():
                if named[name] is not self._host.get((fqn, name)):
                    self._host[fqn, name] = self._offloaded(named[name], self._host.get((fqn, name)))
                    self._state.put(fqn, name, self._host[fqn, name])

    def settle(self) -> None:
        self.rest()
        if self._stream is not None:
            self._stream.synchronize()  # readers of host memory do not wait for the stream

    def loaded(self) -> None:
        self.rest()

    # ---- copies between memories -------------------------------------------------------------------------------------

    def _fetch(self, fqns: Iterable[str]) -> None:
        """Hold the outer state of ``fqns`` on the device until `rest`."""
        copies = self._copies(fqns)
        for (fqn, name), copy in copies.items():
            self._state.put(fqn, name, copy)
            self._ahead.pop((fqn, name), None)
        self._wait_for(copies.values())

    def _offloaded(self, tensor: Tensor, host: Tensor | None) -> Tensor:
        """``tensor`` in host memory, in ``host`` if that was allocated before."""
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if host is None:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            tensor.record_stream(self._stream)
        with self._copy_stream():
            return host.copy_(tensor, non_blocking=True)

    def _copies(self, fqns: Iterable[str], names: Iterable[str] | None = None) -> dict[tuple[str, str], Tensor]:
        """Copies on the device, perhaps still under way, of the tensors that are on the host."""
        copies = {}
        with self._copy_stream():
            for fqn in fqns:
                named = self._state.tensors.get(fqn, {})
                for name in named.keys() & self._names.intersection(names or self._names):
                    key = (fqn, name)
                    if named[name] is self._host.get(key):
                        copies[key] = self._ahead[key] if key in self._ahead else self._on_device(named[name])
        return copies

    def _on_device(self, host: Tensor) -> Tensor:
        return host.clone() if self._stream is None else host.to(self._stream.device, non_blocking=True)

    def _wait_for(self, copies: Iterable[Tensor]) -> None:
        """Make the current stream wait for ``copies``."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)

    @contextmanager
    def _copy_stream(self) -> Iterator[None]:
        """Use the stream of the copies within the block."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield
