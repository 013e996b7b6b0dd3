"""Where replicas wait for each other in the rounds of a local update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dtrain.comm.runtime.loop import LocalUpdateLoop


class Meeting(Protocol):
    """What a loop asks wherever a round comes to its end."""

    def require_quiet(self, loop: LocalUpdateLoop) -> None:
        """Raise ``RuntimeError`` if no checkpoint can be taken now."""

    def wait(self, loop: LocalUpdateLoop, *, closing: bool = False) -> None:
        """Block until all is there that is to be applied now; ``closing``: all that is under way."""

    def leaves_out(self) -> bool:
        """Whether this replica shall leave out a step, since the others wait for it."""


class Peers:
    """Replicas that are always there: each result is waited for where it is used."""

    def require_quiet(self, loop: LocalUpdateLoop) -> None:
        """What is under way is brought to its end, and kept."""

    def wait(self, loop: LocalUpdateLoop, *, closing: bool = False) -> None:
        """Nothing to agree on first."""

    def leaves_out(self) -> bool:
        return False
