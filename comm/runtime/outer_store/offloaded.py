"""The outer state of a local update in host memory: on the device only while a fragment's round begins or ends.

    host (pinned):   anchor, outer momentum
    a step ahead of a fragment's round:     to the device, behind that step, on a stream of their own
    after it:                               back, on the same stream

The bits of the replicated one, and its bytes on the links. For GPUs; on CPUs it costs copies and saves nothing.
Streaming DiLoCo's authors (arXiv:2501.18512) count on it: what will be needed when is known, a fragment at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dtrain.comm.layout import Named
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.consistency import Held
from dtrain.comm.runtime.loop import AttachedLocalUpdate
from dtrain.comm.runtime.parts import Part


class AttachedOffloaded(AttachedLocalUpdate):
    """A `LocalUpdate` whose outer state is offloaded, at work on one rank."""

    def __init__(self, spec: LocalUpdate, pieces: Pieces, seed: int) -> None:
        self._names = {"anchor", *spec.outer.kinds}
        self._host: dict[tuple[str, str], Tensor] = {}
        self._ahead: dict[tuple[str, str], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        super().__init__(spec, pieces, seed)

    def _held_alike(self) -> Held:
        """Where it lies: what is on the host need not come to the device to be compared."""
        if self._stream is not None:
            self._stream.synchronize()
        yield from super()._held_alike()

    def _take_over(self, values: Mapping[str, Tensor]) -> None:
        super()._take_over(values)
        self._stow()  # and what was copied ahead goes

    def close_round(self) -> bool:
        closed = super().close_round()
        self._stow()
        return closed

    def settle(self) -> None:
        super().settle()
        self._stow()
        if self._stream is not None:
            self._stream.synchronize()  # whoever reads host memory next does not know of streams

    def load_integers(self, integers: Mapping[str, int]) -> None:
        super().load_integers(integers)
        self._stow()

    def _after_step(self) -> None:
        super()._after_step()
        self._stow()
        due = [self.parts[number] for number in self._due(ahead=1)]
        for part in (*due, *self._landing(ahead=1)):
            self._ahead |= self._copies(part.fqns)

    def _capture(self, part: Part) -> dict[str, Tensor]:
        self._fetch(part.fqns)
        return super()._capture(part)

    def _apply(self, part: Part, values: Named | None, mix: float) -> None:
        self._fetch(part.fqns)
        super()._apply(part, values, mix)

    def _anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        """On the device, for as long as the caller keeps it."""
        found = super()._anchor(fqns)
        copies = self._copies(found, ["anchor"])
        self._wait_for(copies.values())
        return {fqn: copies.get((fqn, "anchor"), anchor) for fqn, anchor in found.items()}

    def _anchor_at(self, values: Named) -> None:
        super()._anchor_at(values)
        self._stow()

    # ---- between the two memories ------------------------------------------------------------------------------------

    def _fetch(self, fqns: Iterable[str]) -> None:
        """Have the outer state of ``fqns`` on the device until `_stow`."""
        copies = self._copies(fqns)
        for (fqn, name), copy in copies.items():
            self.state.tensors[fqn][name] = copy
            self._ahead.pop((fqn, name), None)
        self._wait_for(copies.values())

    def _stow(self) -> None:
        """Bring all of it back to the host."""
        self._ahead = {}
        for fqn, named in self.state.tensors.items():
            for name in self._names & named.keys():
                if named[name] is not self._host.get((fqn, name)):
                    named[name] = self._host[fqn, name] = self._stowed(named[name], self._host.get((fqn, name)))

    def _stowed(self, tensor: Tensor, host: Tensor | None) -> Tensor:
        """``tensor`` in host memory, in ``host`` if there is such a place already."""
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if host is None:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            tensor.record_stream(self._stream)
        with self._beside():
            return host.copy_(tensor, non_blocking=True)

    def _copies(self, fqns: Iterable[str], names: Iterable[str] | None = None) -> dict[tuple[str, str], Tensor]:
        """On the device, or on their way to it: of what lies on the host."""
        copies = {}
        with self._beside():
            for fqn in fqns:
                named = self.state.tensors.get(fqn, {})
                for name in named.keys() & self._names.intersection(names or self._names):
                    key = (fqn, name)
                    if named[name] is self._host.get(key):
                        copies[key] = self._ahead[key] if key in self._ahead else self._on_device(named[name])
        return copies

    def _on_device(self, host: Tensor) -> Tensor:
        return host.clone() if self._stream is None else host.to(self._stream.device, non_blocking=True)

    def _wait_for(self, copies: Iterable[Tensor]) -> None:
        """What follows on the current stream sees them."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the copies."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield
