"""One optimizer step after the other on this rank's share of the data: what `dtrain train` and its benchmark repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dtrain.comm.batch_norm import RunningStatistics
from dtrain.train.engines.engine import Batch
from dtrain.train.setup import Parts
from dtrain.train.totals import Account

__all__ = ["Stepper"]


class Stepper:
    """Steps ``parts``, and accounts for the time in ``account``."""

    def __init__(self, parts: Parts, account: Account) -> None:
        self._parts, self._account = parts, account
        self._statistics = RunningStatistics(parts.model)

    def step(self, may_compile: Callable[[], bool] = lambda: True) -> float | Tensor:
        """The next step. Returns the mean loss of this rank's share: a tensor, so that nothing waits for it.

        ``may_compile``: asked before the sync's part of the step, whether it may compile a kernel now.
        """
        parts, attached = self._parts, self._parts.attached
        with self._account.step():
            batches = parts.share.microbatches(attached.steps)
            parts.engine.set_learning_rate(parts.learning_rate(attached.steps))
            self._statistics.keep()
            with self._account.computing():
                loss: float | Tensor
                if attached.method.samples:
                    loss = self._tried(batches)
                else:
                    loss = parts.engine.forward_backward(batches)
                    attached.finish()
                    parts.engine.clip()
                attached.may_compile = may_compile()
                if not attached.step():
                    self._statistics.put_back()
        return loss

    def _tried(self, batches: Sequence[Batch]) -> float:
        """Every direction of this step on these batches, forward only; the mean loss of this replica."""
        engine, attached = self._parts.engine, self._parts.attached
        examples = [len(next(iter(batch.values()))) for batch in batches]

        def loss() -> Tensor:
            parts = [engine.evaluate(batch) * count for batch, count in zip(batches, examples, strict=True)]
            return torch.stack(parts).sum() / sum(examples)

        samples = attached.method.samples
        return sum(attached.estimate(loss) for _ in range(samples)) / samples
