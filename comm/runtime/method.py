"""What a sync is: a small frozen value that says what it needs (`Sync`), and the method at work on a rank (`Method`).

A spec is made by a function such as `every_step` or `diloco`, and `bind` puts it to work. `Attached` asks the method
the same few questions whatever it is: can this step be made, make it, what happens behind it, what is kept.
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
    """A method: when, what, how small, how combined. Made by functions such as `every_step` and `diloco`.

    Derive a method of your own from it: a frozen dataclass with ``bind``, and what else of this is not as here.
    """

    constant_rate: ClassVar[bool] = False
    """Whether the learning rate must stay as it is from the first step to the last."""

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        """This method at work on one rank's pieces. Every rank must call it; it may communicate."""
        raise NotImplementedError

    def bind_members(self, pieces: Pieces, seed: int, members: Members) -> Attached:
        """This method at work on one rank's pieces, among replicas that come and go.

        Raises ``TypeError`` for a method that has nothing to wait for them, ``ValueError`` for settings that keep
        replicas together.
        """
        raise TypeError(
            "replicas can come and go between the rounds of a local update, such as diloco(...), and between the steps "
            f"of one_byte(...); this is {self}"
        )

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for an inner optimizer that does not go with it."""
        return None


class Method(Protocol):
    """A method at work on one rank, and what one does that has nothing to do for a question.

    ``samples``: directions that `estimate` tries in each step; 0 for a method that is stepped from gradients.
    ``counters``: those of `numbers` that count from 0. ``always``: names in the state that are kept of every parameter
    from the first step on.
    """

    samples: int = 0
    counters: tuple[str, ...] = ()
    always: tuple[str, ...] = ()

    @property
    def exchange(self) -> Exchange | None:
        """What the gradients of each step go through on their way to the optimizer; None: they stay as they are."""
        return None

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way."""
        return True

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        """Try the next direction on ``loss()``; for methods of forward passes only."""
        raise RuntimeError(
            "this sync is stepped from gradients: call loss.backward() before step(); estimate(...) is for one_byte "
            "and fedkseed"
        )

    def prepare(self) -> bool:
        """Whether all ranks can make this step: the same everywhere. Called once a step; may communicate."""
        raise NotImplementedError

    def advance(self) -> None:
        """Make the step: what `prepare` found is good, and the state of its exchange is committed."""
        raise NotImplementedError

    def skip(self) -> None:
        """No step: somebody's gradients were not usable, and the state of their exchange is rolled back."""
        raise NotImplementedError

    def after_step(self) -> None:
        """What happens to the parameters behind each step, made or skipped. The step is counted already."""
        return None

    def weigh(self, tokens: int) -> None:
        """Say, before `step`, how many tokens this replica's step was made from."""
        raise RuntimeError("this sync counts all replicas alike; a local update such as diloco(...) has weigh(tokens)")

    def close_round(self) -> bool:
        """Combine now what the next step that communicates would combine; True if there was anything."""
        return False

    def settle(self) -> None:
        """Wait for what is under way, so that the state holds all that a checkpoint needs; nothing is applied."""
        return None

    def to_evaluate(self) -> dict[str, Tensor] | None:
        """The parameters that are evaluated and exported; None for the live ones."""
        return None

    def verify(self) -> bool:
        """Compare what must be equal on all replicas, and make it so; True if it was."""
        raise NotImplementedError

    def numbers(self) -> Numbers:
        """What a checkpoint keeps besides the state's tensors."""
        return {}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        """Undo `numbers`; the state's tensors were loaded before."""
        return None

    def report(self) -> str:
        """What `Attached.report` ends with."""
        return ""

    def detach(self) -> None:
        """Close what the method has opened."""
        return None
