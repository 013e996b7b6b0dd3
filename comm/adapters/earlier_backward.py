"""What further backward passes of a step find in the gradients of a DDP model: the results of the step's exchanges.

DDP adds each pass to what is there already and hands over the sum. Where feedback compresses what each pass brings,
that has to be told apart again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from weakref import ref

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dtrain.comm.layout import working


class Before:
    """Watches the gradients of ``parameters``. Copies are made in steps of several exchanges only."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self._exchanged = False  # in this step
        self._kept: dict[str, Tensor] = {}
        me = ref(self)  # parameters hold their hooks, where nobody looks for cycles
        self._hooks: list[RemovableHandle] = [
            parameter.register_hook(partial(_keep, me, fqn)) for fqn, parameter in parameters.items()
        ]

    def pass_ended(self) -> None:
        """All gradients of a backward pass have been handed over: what comes in this step adds to their results."""
        self._exchanged = True

    def step_ended(self) -> None:
        self._exchanged, self._kept = False, {}

    def take(self, fqns: Collection[str]) -> dict[str, Tensor]:
        """What gradients that are handed over now held before this pass, flat; nothing in a step's first one."""
        found = {}
        for fqn in fqns if self._exchanged else ():
            kept = self._kept.pop(fqn, None)
            if kept is None and self.parameters[fqn].grad is not None:  # this pass has not reached it
                kept = self.parameters[fqn].grad
            if kept is not None:
                found[fqn] = working(kept.detach().clone()).reshape(-1)
        return found

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _keep(before: ref[Before], fqn: str, incoming: Tensor) -> None:
    found = before()
    if found is None or not found._exchanged or fqn in found._kept:
        return
    gradient = found.parameters[fqn].grad
    if gradient is not None:
        found._kept[fqn] = gradient.detach().clone()
