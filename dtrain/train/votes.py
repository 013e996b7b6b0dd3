"""Control messages between all ranks: a few numbers a step, on a gloo group and thread of their own.

The exchange of a step is started at its end and read when the next one is due, so a slow link delays no step unless
its round trip takes longer than the steps between two exchanges. All ranks read it at the same step, so all come to the
same decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.comm.channel import Channel, Handle
from dtrain.comm.ops import AllGather, Flow


@dataclass(frozen=True)
class Report:
    """One rank's report of a step. ``stop``: the number of the signal that asked it to stop, or 0."""

    stop: int
    loss: float
    tokens: int


class Control:
    """Reports, votes and barriers across all ranks of a run."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._under_way: Handle[list[list[float]]] | None = None

    def start(self, report: Report) -> None:
        """Send this rank's report in the background. `collect` the one before first."""
        self._under_way = self.channel.start(_gather([report.stop, report.loss, report.tokens]), "control")

    def collect(self) -> Report | None:
        """The last report that was started, combined over all ranks; None if none is under way.

        ``stop``: the first signal in rank order; ``loss``: the token-weighted mean; ``tokens``: the sum.
        """
        if self._under_way is None:
            return None
        rows = self._under_way.wait()
        self._under_way = None
        tokens = sum(int(row[2]) for row in rows)
        loss = sum(row[1] * row[2] for row in rows) / max(tokens, 1)
        return Report(stop=next((int(row[0]) for row in rows if row[0]), 0), loss=loss, tokens=tokens)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Elementwise sums over all ranks, added in rank order. Blocks."""
        return [sum(column) for column in zip(*self.rows(numbers, "evaluation"), strict=True)]

    def rows(self, numbers: Sequence[float], label: str) -> list[list[float]]:
        """Each rank's numbers, in rank order: ``[world][len(numbers)]``. Blocks."""
        return self.channel.run(_gather(numbers), label)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.rows([0.0], "barrier")


def _gather(numbers: Sequence[float]) -> Flow[list[list[float]]]:
    (rows,) = yield AllGather((torch.tensor(numbers, dtype=torch.float64),))
    listed: list[list[float]] = rows.tolist()
    return listed
