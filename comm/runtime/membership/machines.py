"""The seam between `one_byte` and the machines that it exchanges bytes with in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dtrain.comm.shared_seed.update_log import Record, UpdateLog


@dataclass(frozen=True)
class Gathered:
    """The bytes of all machines in a step. ``codes`` [machines, samples]; ``workers``: their numbers, in that order."""

    codes: Tensor
    epoch: int
    workers: tuple[int, ...]


class TakingPart(Protocol):
    """This machine among the others.

    ``number``: of this machine, from which its directions are drawn. ``log``: its update log, on the rank that writes
    one.
    """

    log: UpdateLog | None

    @property
    def number(self) -> int: ...

    def exchange(self, codes: Tensor) -> Gathered | None:
        """The ``codes`` [samples] of all machines; None if this one was behind and has caught up past this step.

        The context's ``steps`` is then that of the last step of the others.
        """

    def gathered(self, value: Tensor, label: str) -> Tensor | None:
        """``value`` of all machines, [machines, ...]; None if one is lost meanwhile."""

    def keep(self, record: Record) -> None:
        """Log a step that was made."""

    def go_on(self, digest: int) -> None:
        """Resume after a state was loaded whose weights have this ``digest``."""

    def detach(self) -> None:
        """Called after the last step."""
