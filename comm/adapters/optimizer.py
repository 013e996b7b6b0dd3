"""The state of a torch optimizer as flat pieces: what every engine's checkpoint has in common.

Elementwise optimizers only (SGD, Adam, AdamW, RMSprop, Adagrad, ...): each state tensor has the parameter's shape, or
is a number such as a step count. A whole-matrix optimizer's state could not be cut along shards that differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtrain.comm.adapters.forwarding import Forwarded, forwarded_engine
from dtrain.comm.layout import Named


class StepGuard:
    """Refuses a step of the optimizer that the sync did not make: it would silently communicate nothing.

    `forward` makes it the sync's step instead.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in _GUARDED:
            raise RuntimeError("a sync is attached to this optimizer already; call its detach() first")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{type(optimizer).__name__} evaluates the model again within its step (it needs a closure), which "
                "sync.step() cannot give it; use an optimizer that steps from gradients, for example AdamW"
            )
        _GUARDED.add(optimizer)
        self._optimizer = optimizer
        self._allowed = False
        self._undo: Callable[[], None] = lambda: None
        members: tuple[torch.optim.Optimizer, ...] = getattr(optimizer, "members", ())  # of several that are one
        self._hooks = [each.register_step_pre_hook(self._check) for each in (optimizer, *members)]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within it the optimizer may step."""
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def forward(self, steppers: Sequence[Any], step: Callable[[], object]) -> None:
        """Make ``stepper.step()`` the sync's ``step`` until `remove`.

        ``steppers``: what the trainer steps: the optimizer, or all of its members, or one DeepSpeed engine.
        """
        if isinstance(steppers[0], torch.optim.Optimizer):
            self._undo = Forwarded(steppers, step, lambda optimizer: self._allowed or _is_dry(optimizer)).undo
        else:
            self._undo = forwarded_engine(steppers[0], step, lambda _: self._allowed)

    def remove(self) -> None:
        """The optimizer may be stepped directly again."""
        self._undo()
        _GUARDED.discard(self._optimizer)
        for hook in self._hooks:
            hook.remove()

    def _check(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._allowed and not _is_dry(optimizer):
            raise RuntimeError(
                "this optimizer is stepped by its sync: call sync.step() where optimizer.step(), or engine.step() at "
                "the last microbatch, was called, or attach with forward_steps=True, which makes it the same; "
                "sync.detach() gives it back. Where it was a GradScaler: dtrain.GradScaler (docs/own_loop.md)"
            )


def _is_dry(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step would only create the optimizer's state: torch makes one before it loads a state.

    ``torch.distributed.checkpoint.state_dict`` does so with zero gradients and rates of 0. Rates alone are not
    enough: a warm-up begins with 0 too.
    """
    if optimizer.state or any(float(group.get("lr", 1.0)) != 0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not any(bool(_on_this_rank(gradient).any()) for gradient in gradients)


def _on_this_rank(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_GUARDED: WeakSet[torch.optim.Optimizer] = WeakSet()


def is_scalar(tensor: Tensor) -> bool:
    """Whether a state tensor is a number (a step count) that belongs to no single element."""
    return tensor.dim() == 0


def require_elementwise(tensor: Tensor, parameter: Tensor, label: str) -> None:
    """Raise ``ValueError`` unless a state tensor is a number or has one element for each of its parameter."""
    if not is_scalar(tensor) and tensor.shape != parameter.shape:
        raise ValueError(
            f"{label} has shape {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}; only elementwise "
            "optimizers can be checkpointed, for example AdamW"
        )


def elementwise_state(
    optimizer: torch.optim.Optimizer, parameters: Named, local: Callable[[Tensor], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """State by name and FQN. ``local`` turns a state tensor into this rank's piece; numbers stay as they are.

    Raises ``ValueError`` for a state tensor of another shape than its parameter, and for one that is not a tensor.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for fqn, parameter in parameters.items():
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue  # SGD without momentum stores momentum_buffer=None
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            require_elementwise(tensor, parameter, f"the optimizer's {name!r} of {fqn}")
            state.setdefault(name, {})[fqn] = tensor if is_scalar(tensor) else local(tensor)
    return state


def load_elementwise_state(
    optimizer: torch.optim.Optimizer,
    parameters: Named,
    state: Mapping[str, Named],
    whole: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Undo `elementwise_state`. ``whole(piece, parameter)`` makes of a piece the optimizer's tensor for a parameter."""
    optimizer.state.clear()
    for name, tensors in state.items():
        for fqn, value in tensors.items():
            parameter = parameters[fqn]
            optimizer.state[parameter][name] = value.clone() if is_scalar(value) else whole(value.clone(), parameter)
