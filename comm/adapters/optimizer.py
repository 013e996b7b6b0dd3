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

from dtrain.comm.adapters.forwarding import Forwarded, forwarded_engine, hyperparameters
from dtrain.comm.inner_optimizers.chained import with_members
from dtrain.comm.layout import Named


class StepGuard:
    """Refuses a step of the optimizer that the sync did not make: it would silently communicate nothing.

    `forward` makes it the sync's step instead.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in _GUARDED:
            raise RuntimeError("a sync is attached to this optimizer already; call its detach() first")
        optimizers = with_members(optimizer)
        for stepped in optimizers:
            closure = inspect.signature(type(stepped).step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ValueError(
                    f"{type(stepped).__name__} evaluates the model again within its step (it needs a closure), which "
                    "sync.step() cannot give it; use an optimizer that steps from gradients, for example AdamW"
                )
        _GUARDED.add(optimizer)
        self._optimizer = optimizer
        self._allowed = False
        self._undo: Callable[[], None] = lambda: None
        self._hooks = [stepped.register_step_pre_hook(self._check) for stepped in optimizers]

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

    ``torch.distributed.checkpoint.state_dict`` does so with zero gradients and rates of 0; torchtitan also where only
    some parameters have no state, of these alone. Rates are not enough: a warm-up begins with 0 too.
    """
    if any(float(group.get("lr", 1.0)) != 0 for group in optimizer.param_groups):
        return False
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if optimizer.state and (not stepped or any(optimizer.state.get(p) for p in stepped)):
        return False
    return not any(bool(_on_this_rank(p.grad).any()) for p in stepped)


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


def local_snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state and the hyperparameters of any optimizer on this rank, of DTensors the local part.

    ``{"state": {number of the parameter: {name: value}}, "groups": [{name: value}]}``; the tensors are the optimizer's.
    """
    state: dict[int, dict[str, Any]] = {}
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if named := optimizer.state.get(p):
            state[number] = {n: _on_this_rank(v) if isinstance(v, Tensor) else v for n, v in named.items()}
    return {"state": state, "groups": hyperparameters(optimizer)}


def load_local_snapshot(optimizer: torch.optim.Optimizer, snapshot: Mapping[str, Any]) -> None:
    """Undo `local_snapshot`. Raises ``ValueError`` for that of an optimizer with other groups or parameters."""
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    state: Mapping[int, Mapping[str, Any]] = snapshot["state"]
    unknown = [number for number in state if not 0 <= number < len(parameters)]
    if unknown:
        raise ValueError(
            f"the saved optimizer has state for parameter {unknown[0]}, and this one has {len(parameters)} parameters; "
            "make the same optimizer"
        )
    load_hyperparameters(optimizer, snapshot["groups"])
    optimizer.state.clear()
    for number, named in state.items():
        p, group = parameters[number]
        counts = p.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        optimizer.state[p] = {
            name: _placed(value, p, counts) if isinstance(value, Tensor) else value for name, value in named.items()
        }


def load_hyperparameters(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ``ValueError`` for another number of groups."""
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the saved optimizer has {len(groups)} groups of parameters, and this one {len(optimizer.param_groups)}; "
            "make the same optimizer"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for name, value in saved.items():
            now = group.get(name)
            group[name] = value.to(now.device) if isinstance(value, Tensor) and isinstance(now, Tensor) else value


def _placed(value: Tensor, parameter: Tensor, counts: torch.device) -> Tensor:
    """A state tensor as the optimizer keeps it: numbers on ``counts``, all else beside its parameter."""
    if is_scalar(value):
        return value.to(counts, copy=True)
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device, copy=True)
    local = value.to(parameter.to_local().device, copy=True)
    if value.shape != parameter.to_local().shape:
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
