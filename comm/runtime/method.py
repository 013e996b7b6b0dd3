"""What a sync is: a small frozen value that says what it needs (`Sync`), and the method at work on a rank (`Method`).

A spec is made by a function such as `every_step` or `diloco`, and `bind` puts it to work. `Attached` calls every method
in the same way: whether this step can be made, make it, what follows it, what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from dtrain.comm.pieces import Exchange, Pieces
from dtrain.comm.state import Numbers

if TYPE_CHECKING:
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.membership.members import Members


@runtime_checkable
class Sync(Protocol):
    """A method: when replicas exchange what, how it is compressed and combined. Made by functions such as `diloco`.

    Derive a method of your own from it: a frozen dataclass with ``bind``, and whatever else differs from here.
    """

    constant_rate: ClassVar[bool] = False
    """Whether the learning rate must be constant."""

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        """This method at work on one rank's pieces. Every rank must call it; it may communicate."""
        raise NotImplementedError

    def bind_members(self, pieces: Pieces, seed: int, members: Members) -> Attached:
        """This method at work on one rank's pieces, in an elastic run.

        Raises ``TypeError`` for a method that cannot be elastic, ``ValueError`` for settings that cannot.
        """
        raise TypeError(
            "replicas can come and go between the rounds of a local update, such as diloco(...), and between the steps "
            f"of one_byte(...); this is {self}"
        )

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for an inner optimizer that the method does not support."""
        return None


class Method(Protocol):
    """A method at work on one rank, with defaults for what a method may leave out.

    ``samples``: directions that `estimate` tries in each step; 0 for a method that is stepped from gradients.
    ``rounds``: of local updates, that were applied; where the model is cut into fragments, of all of them together.
    ``counters``: those of `numbers` that count from 0. ``always``: names in the state that every parameter has from the
    first step on.
    """

    samples: int = 0
    rounds: int = 0
    counters: tuple[str, ...] = ()
    always: tuple[str, ...] = ()

    @property
    def exchange(self) -> Exchange | None:
        """What combines the gradients of each step before the optimizer uses them; None: nothing."""
        return None

    @property
    def quiet(self) -> bool:
        """Whether no exchange is under way."""
        return True

    @property
    def in_round(self) -> bool:
        """Whether steps were made that no exchange has taken yet, and that `close_round` would."""
        return False

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        """Try the next direction on ``loss()``; for methods of forward passes only."""
        raise RuntimeError(
            "this sync is stepped from gradients: call loss.backward() before step(); estimate(...) is for one_byte "
            "and fedkseed"
        )

    def prepare(self) -> bool:
        """Whether all ranks can make this step; the same on all. Called once a step; may communicate."""
        raise NotImplementedError

    def advance(self) -> None:
        """Make the step: `prepare` returned True, and the state of its exchange is committed."""
        raise NotImplementedError

    def skip(self) -> None:
        """Skip the step: `prepare` returned False, and the state of its exchange is rolled back."""
        raise NotImplementedError

    def after_step(self) -> None:
        """What happens to the parameters after each step, made or skipped. The step is counted already."""
        return None

    def weigh(self, tokens: int) -> None:
        """Set, before `step`, how many tokens this replica's step was made from."""
        raise RuntimeError("this sync counts all replicas alike; a local update such as diloco(...) has weigh(tokens)")

    def close_round(self) -> bool:
        """Exchange now what the next step with an exchange would send; True if there was anything."""
        return False

    def settle(self) -> None:
        """Wait for exchanges under way, so that the state is complete for a checkpoint; apply nothing."""
        return None

    def to_evaluate(self) -> dict[str, Tensor] | None:
        """The parameters to evaluate and export; None for the live ones."""
        return None

    def verify(self) -> bool:
        """Compare what must be equal on all replicas, and repair it; True if it was equal, or if nothing must be.

        Called by the method itself every ``verify_every`` steps, exchanges or rounds, and before each checkpoint of
        `dtrain train`.
        """
        return True

    def numbers(self) -> Numbers:
        """What a checkpoint keeps beside the state's tensors."""
        return {}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        """Undo `numbers`, once the state's tensors were loaded."""
        return None

    def report(self) -> str:
        """The end of `Attached.report`."""
        return ""

    def detach(self) -> None:
        """Close what the method has opened."""
        return None
