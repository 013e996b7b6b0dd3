"""The parameters that a method trains, and whether they are still those of the model: it would not sync a new one.

Checked before each step, by names and identities only, so that all ranks decide alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dtrain.comm.adapters.communicating_optimizers import Listening
from dtrain.comm.adapters.wrappers import named_parameters
from dtrain.comm.torch_private import parameters_by_module, version_of

WAY_OUT = (
    "on every rank: sync.close_round(), sync.detach(), and attach to the model as it is now, before the next backward "
    "(DistributedDataParallel, which takes the parameters that were trainable when it was built, has to be built anew)"
)


class Trained:
    """The trainable parameters of ``model`` as they were at attach.

    Args:
        optimizer: the one that the sync steps; None if its groups hold other tensors than parameters (DeepSpeed).
        gathered_back: where an engine swaps parameters in a forward pass (FSDP2): swaps them back.

    ``outside``: names of those that ``optimizer`` does not step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        gathered_back: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self._gathered_back = model, optimizer, gathered_back
        self.parameters = {name: p for name, p in named_parameters(model) if p.requires_grad}
        self.differ = False
        """Whether replicas differ between their rounds."""
        # DeepSpeed's stage 3 empties and fills parameters as it needs them.
        fixed = optimizer is not None
        self._properties = [(p, p.dtype, p.device, p.shape if fixed else None) for p in self.parameters.values()]
        self._ids = {id(p) for p in self.parameters.values()}
        stepped = None if optimizer is None else {id(p) for p in _stepped(optimizer)}
        self.outside = [
            name for name, p in self.parameters.items() if stepped is not None and id(p) not in stepped and p.numel()
        ]
        self.listening: Listening | None = None
        self._watch: _Watch | None = None
        self._told_of_no_gradient = False
        self._require_free()

    def require_unchanged(self) -> None:
        """Raise ``RuntimeError`` for a trainable parameter that is new since attach, or its dtype, device or shape is.

        Parameters that were frozen or removed since then are no longer trained, without an error.
        """
        if any(id(p) not in self._ids and p.requires_grad for p in parameters_by_module(self.model)):
            if self._gathered_back is not None:
                self._gathered_back()
            new = {name: p for name, p in named_parameters(self.model) if p.requires_grad and id(p) not in self._ids}
            if new:
                raise RuntimeError(
                    f"{_some(new)} became trainable, or came into the model, after attach: every replica would train "
                    f"it alone. Freeze it (requires_grad_(False)), or {WAY_OUT}"
                )
        if self.optimizer is not None:
            foreign = sum(p.requires_grad and id(p) not in self._ids for p in _stepped(self.optimizer))
            if foreign:
                raise RuntimeError(
                    f"{foreign} of the optimizer's parameters came into it after attach (add_param_group?), and are "
                    f"not those that the model had: every replica would train them alone. Leave them out, or {WAY_OUT}"
                )
        for p, dtype, device, shape in self._properties:
            if p.dtype != dtype or p.device != device or shape not in (None, p.shape):
                name = next(name for name, parameter in self.parameters.items() if parameter is p)
                raise RuntimeError(
                    f"{name} was {dtype} {tuple(shape or p.shape)} on {device} at attach, and is {p.dtype} "
                    f"{tuple(p.shape)} on {p.device}; convert and move the model before attach, or {WAY_OUT}"
                )
        if self._watch is not None:
            self._watch.require_in_order()

    def require_there(self, names: Iterable[str]) -> None:
        """Raise ``RuntimeError`` if one of these, whose gradients were exchanged in this step, has none any more."""
        gone = next((name for name in names if self.parameters[name].grad is None), None)
        if gone is not None:
            raise RuntimeError(
                f"the gradient of {gone} was exchanged in this step, and is gone: zero_grad() came before sync.step(), "
                "which clears what it has used itself; step and clear other optimizers after it"
            )

    def warn_of_outside(self) -> None:
        """Warn of parameters that the sync's optimizer does not step. Once, at attach."""
        if self.outside:
            when = (
                "between backward() and sync.step(), or their steps of a round are lost"
                if self.differ
                else "after sync.step() returned True, and clear its gradients then"
            )
            warnings.warn(
                f"{_some(self.outside)} of {len(self.parameters)} trainable parameters are not in the optimizer that "
                "was given to attach, so sync.step() does not step them. Freeze what shall not be trained "
                f"(requires_grad_(False)); if another optimizer trains it, step that one {when}",
                RuntimeWarning, stacklevel=4,
            )  # fmt: skip

    def watch_outside(self) -> None:
        """Detect from now on whether a parameter outside of the optimizer is stepped at the wrong time."""
        if self.outside:
            # A gradient marks the beginning of a step; where the engine sets gradients, the forward pass does.
            self._watch = _Watch(self, None if self._gathered_back is None else self.model)

    def require_still(self) -> None:
        """Raise ``RuntimeError`` if what is outside of the optimizer has moved since the last step of the sync."""
        if self._watch is not None:
            self._watch.require_still()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A context for the optimizer's step. Raises ``RuntimeError`` at its end if the optimizer communicates.

        Warns once of a step for which no parameter has a gradient.
        """
        self._warn_of_no_gradient()
        with self.writing(), nullcontext() if self.listening is None else self.listening.checked():
            yield

    def _warn_of_no_gradient(self) -> None:
        """On this rank alone: others may have gradients, and an error would leave them waiting."""
        # What is frozen since attach needs none, and another optimizer may have used and cleared those outside.
        if self._told_of_no_gradient or self.outside or any(p.grad is not None for p in self.parameters.values()):
            return
        trained = sum(p.requires_grad for p in self.parameters.values())
        if trained:
            self._told_of_no_gradient = True
            warnings.warn(
                f"a step trained nothing: none of {trained} trainable parameters has a gradient. Was backward() not "
                "called, or zero_grad() after it? sync.step() clears what it has used itself",
                RuntimeWarning, stacklevel=7,
            )  # fmt: skip

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context for the method's own writes to parameters; others are those of another optimizer."""
        if self._watch is not None:
            self._watch.look()
        yield
        if self._watch is not None:
            self._watch.mark()

    def clear(self) -> None:
        """Clear all gradients, also of parameters outside of the optimizer."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def claim(self) -> None:
        """Reserve the parameters for this sync until `release`."""
        for parameter in self.parameters.values():
            _CLAIMED[parameter] = ref(self)

    def release(self) -> None:
        """Free the parameters for another sync."""
        for parameter in self.parameters.values():
            owner = _CLAIMED.get(parameter)
            if owner is not None and owner() is self:
                del _CLAIMED[parameter]
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _require_free(self) -> None:
        for name, parameter in self.parameters.items():
            owner = _CLAIMED.get(parameter)
            if owner is not None and owner() is not None:
                raise RuntimeError(
                    f"a sync is attached to this model already, to its parameter {name} among others; call its "
                    "detach() first. One sync has all parameters of a model, whatever optimizers step them"
                )


_CLAIMED: Any = WeakTensorKeyDictionary()
"""Which `Trained` has a parameter, weakly on both sides: one that is dropped without `release` frees it."""


class _Watch:
    """Detects another optimizer that steps its parameters after the sync's step instead of before it.

    After a step of the sync nothing may move before the next gradients: such an update would be missing from the round
    that has ended. A second optimizer is recognized by writes to its own parameters alone; loading weights writes to
    all of them.
    """

    def __init__(self, trained: Trained, root: nn.Module | None) -> None:
        outside = set(trained.outside)
        self._outside = {name: trained.parameters[name] for name in trained.outside}
        self._others = [p for name, p in trained.parameters.items() if name not in outside and p.numel()]
        self._versions: list[int] = []
        self._open = False
        self._late = ""
        if root is not None:
            self._hooks = [root.register_forward_pre_hook(_weakly(self))]
        else:
            self._hooks = [p.register_post_accumulate_grad_hook(_weakly(self)) for p in self._outside.values()]

    def mark(self) -> None:
        self._versions, self._open = self._now(), False

    def look(self) -> None:
        if not self._open:
            self._late = self._late or self._moved()

    def begun(self) -> None:
        """The first gradients, or the first forward pass, since the last step of the sync."""
        self.look()
        self._open = True

    def require_in_order(self) -> None:
        late, self._late = self._late, ""
        if late:
            raise RuntimeError(
                f"{late}, which the optimizer that was given to attach does not step, moved after sync.step(), so not "
                "in the round that it ended: replicas differ by it. Step the other optimizer before sync.step()"
            )

    def require_still(self) -> None:
        self.look()
        self.require_in_order()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _moved(self) -> str:
        """An outside parameter that has moved while those that the sync steps have not; empty for none."""
        now = self._now()
        if not self._versions or now[len(self._outside) :] != self._versions[len(self._outside) :]:
            return ""
        return next((name for name, a, b in zip(self._outside, now, self._versions, strict=False) if a != b), "")

    def _now(self) -> list[int]:
        return [version_of(p) for p in (*self._outside.values(), *self._others)]


def _weakly(watch: _Watch) -> Callable[..., None]:
    """A hook that does not keep ``watch`` alive."""
    weak_watch = ref(watch)

    def hook(*_: object) -> None:
        alive = weak_watch()
        if alive is not None:
            alive.begun()

    return hook


def _stepped(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _some(names: Any) -> str:
    """The first of ``names``, and how many more there are."""
    first, *others = list(names)
    return f"{first} and {len(others)} more" if others else str(first)
