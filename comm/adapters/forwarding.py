"""Makes ``optimizer.step()`` the step of a sync, for trainers that step their optimizers themselves.

The optimizer gets a bound method of its own and stays the object that it is: schedulers read ``step.__func__``, and
trainers keep the optimizer that they were given. Hooks on a step would not do: they run before a closure has computed
the gradients, and cannot leave a step out.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dtrain.comm.torch_private import copy_scheduler_mark, mark_stepped


class Forwarded:
    """The steps of optimizers, forwarded to a sync until `undo`.

    Args:
        optimizers: what the trainer steps. Of several the sync steps when the last one was asked; until then the
            gradients of the others are kept, and each steps with the hyperparameters of when it was asked.
        step: the sync's.
        is_real: whether a step is the optimizer's own: one that the sync makes, or one that only creates its state.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], step: Callable[[], object],
        is_real: Callable[[torch.optim.Optimizer], bool],
    ) -> None:  # fmt: skip
        self._step, self._is_real, self._number = step, is_real, len(optimizers)
        self._asked: dict[int, list[dict[str, Any]]] = {}
        self._live = True
        self._undo = [undo for optimizer in optimizers for undo in (self._forward(optimizer), self._keep(optimizer))]

    def undo(self) -> None:
        """Steps are the optimizer's own again; where somebody has wrapped ours meanwhile, ours passes them on."""
        self._live = False
        for undo in self._undo:
            undo()

    def _forward(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        original: Any = optimizer.step

        def step(itself: Any, closure: Callable[[], float] | None = None, *args: Any, **kwargs: Any) -> Any:
            if not self._live or self._is_real(itself):
                with self._as_asked(itself):
                    return original(*(() if closure is None else (closure,)), *args, **kwargs)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._ask(itself)
            return loss

        copy_scheduler_mark(original, step)
        return _replaced(optimizer, "step", step)

    def _keep(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """While the others have not been asked, `zero_grad` leaves the gradients that the step will need."""
        if self._number == 1:
            return lambda: None
        original = optimizer.zero_grad

        def zero_grad(itself: torch.optim.Optimizer, set_to_none: bool = True) -> None:
            if id(itself) not in self._asked or len(self._asked) == self._number:
                original(set_to_none)

        return _replaced(optimizer, "zero_grad", zero_grad)

    def _ask(self, optimizer: Any) -> None:
        if id(optimizer) in self._asked:
            raise RuntimeError(
                f"this {type(optimizer).__name__} was stepped twice, and another optimizer of the same sync not yet; "
                "step each of them once, then the next"
            )
        mark_stepped(optimizer)  # for its scheduler, which may be stepped before the last optimizer is
        self._asked[id(optimizer)] = _copied(hyperparameters(optimizer)) if self._number > 1 else []
        if len(self._asked) == self._number:
            try:
                self._step()
            finally:
                self._asked.clear()

    @contextmanager
    def _as_asked(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """With the hyperparameters of when it was asked: a scheduler may have been stepped since."""
        then = self._asked.get(id(optimizer), [])
        now = [dict(group) for group in optimizer.param_groups] if then else []
        for group, values in zip(optimizer.param_groups, then, strict=False):
            group.update(values)
        try:
            yield
        finally:
            for group, values in zip(optimizer.param_groups, now, strict=False):
                group.update(values)


def forwarded_engine(engine: Any, step: Callable[[], object], is_real: Callable[[Any], bool]) -> Callable[[], None]:
    """The same for ``engine.step()`` of DeepSpeed at the last microbatch; returns how to undo it."""
    original = engine.step
    live = [True]

    def engine_step(itself: Any, *args: Any, **kwargs: Any) -> None:
        if not live or is_real(itself) or not itself.is_gradient_accumulation_boundary():
            original(*args, **kwargs)
        else:
            step()

    restore = _replaced(engine, "step", engine_step)

    def undo() -> None:
        live.clear()
        restore()

    return undo


def _replaced(owner: object, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Give ``owner`` a bound method of its own; returns how to take it away, unless it was wrapped since."""
    before, own = vars(owner).get(name), types.MethodType(function, owner)
    setattr(owner, name, own)

    def undo() -> None:
        if vars(owner).get(name) is not own:
            return
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group, without its parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _copied(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{n: v.clone() if isinstance(v, Tensor) else v for n, v in group.items()} for group in groups]
