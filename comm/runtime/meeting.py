"""Where replicas wait for each other in the rounds of a local update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dtrain.comm.runtime.loop import LocalUpdateLoop


class Meeting(Protocol):
    """What a loop calls at the end of a round."""

    def require_quiet(self, loop: LocalUpdateLoop) -> None:
        """Raise ``RuntimeError`` if no checkpoint can be taken now."""

    def wait(self, loop: LocalUpdateLoop, *, closing: bool = False) -> None:
        """Block until the results to apply now have arrived; ``closing``: all that are under way."""

    def leaves_out(self) -> bool:
        """Whether this replica leaves out a step, since the others wait for it."""


class Peers:
    """The same replicas from beginning to end: each result is waited for where it is used."""

    def require_quiet(self, loop: LocalUpdateLoop) -> None:
        """Never: exchanges under way are completed, and their results saved."""

    def wait(self, loop: LocalUpdateLoop, *, closing: bool = False) -> None:
        """Nothing to wait for here."""

    def leaves_out(self) -> bool:
        return False
