"""The parameters to evaluate and export in place of those in training: entered, left, and paused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

from torch import Tensor

from dtrain.comm.batch_norm import Norm, pooled, recalibrated
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.method import Method
from dtrain.comm.runtime.optimizer_mode import mode_kept


class Shown:
    """What the model of one sync holds now. ``live``: the parameters in training, while it holds others."""

    def __init__(self, context: Context, method: Method) -> None:
        self._context, self._method = context, method
        self._pieces: Pieces = context.pieces
        self.live: Mapping[str, Tensor] | None = None

    @contextmanager
    def shown(self, recalibrate: Callable[[], object] | None) -> Iterator[None]:
        """Within it the model holds what `Method.to_evaluate` gives."""
        values, norms = self._method.to_evaluate(), list[Norm]()
        live, before = self._pieces.read() if values is not None else {}, self.live
        try:
            if values is not None:
                self._pieces.write(values)
                self.live = live if before is None else before
            if recalibrate is not None:
                norms = recalibrated(recalibrate)
                membership = self._context.membership
                membership.votes.run(pooled(norms, membership.together), "recalibrate")
            with mode_kept(self._pieces.optimizer):
                yield
        finally:
            for norm in norms:
                norm.put_back()
            self.live = before
            if values is not None:
                self._pieces.write(live)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model holds the parameters in training, also within `shown`."""
        if self.live is None:
            yield
            return
        live, shown = self.live, self._pieces.read()
        self._pieces.write(live)
        self.live = None
        try:
            yield
        finally:
            self.live = live
            self._pieces.write(shown)


class Evaluation:
    """A ``with`` block, or a pair of calls where a trainer has one callback for the beginning and one for the end.

    >>> shown = sync.evaluation()  # doctest: +SKIP
    >>> shown.enter()  # doctest: +SKIP
    >>> with shown.paused():  # the parameters in training, for a checkpoint  # doctest: +SKIP
    ...     save(model)
    >>> shown.leave()  # doctest: +SKIP
    """

    def __init__(
        self, block: Callable[[], AbstractContextManager[None]], paused: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._block, self._paused = block, paused
        self._entered = ExitStack()
        self._depth = 0

    def enter(self) -> None:
        """Show the parameters to evaluate. Every rank must call it; within itself it changes nothing."""
        if self._depth == 0:
            self._entered.enter_context(self._block())
        self._depth += 1

    def leave(self) -> None:
        """Restore the parameters in training, at the `leave` of the first `enter`; without one it changes nothing."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._entered.close()

    def paused(self) -> AbstractContextManager[None]:
        """Within it the model holds the parameters in training. Every rank must enter it."""
        return self._paused()

    def __enter__(self) -> Evaluation:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
