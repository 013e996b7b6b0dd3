"""Who takes part in the steps of methods whose machines tell each other a few bytes in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dtrain.comm.shared_seed.update_log import Record, UpdateLog


@dataclass(frozen=True)
class Gathered:
    """Everybody's bytes of a step. ``codes`` [machines, samples]; ``workers``: their numbers, in that order."""

    codes: Tensor
    epoch: int
    workers: tuple[int, ...]


class TakingPart(Protocol):
    """This machine among the others.

    ``number``: its own, to which its directions belong. ``log``: what it writes down, on the rank that does.
    """

    log: UpdateLog | None

    @property
    def number(self) -> int: ...

    def exchange(self, codes: Tensor) -> Gathered | None:
        """Everybody's ``codes`` [samples]; None if this machine was behind, and is now past this step.

        In that case the context's ``steps`` is that of the step that was made last by the others.
        """

    def gathered(self, value: Tensor, label: str) -> Tensor | None:
        """``value`` of everybody, [machines, ...]; None if a machine was lost meanwhile."""

    def keep(self, record: Record) -> None:
        """Write down a step that was made."""

    def go_on(self, digest: int) -> None:
        """A state was loaded, of which the weights have this ``digest``."""

    def detach(self) -> None:
        """No more steps will be made."""
