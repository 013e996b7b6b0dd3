"""What a sync remembers from step to step: ``{fqn: {name: tensor}}``, and the next values, staged.

A step is a transaction. Flows stage their next state while the old one stays as it is; at the end of the step all
ranks agree to `commit` it everywhere or to `rollback` it everywhere. The price is a second copy of what is staged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dtrain.comm.layout import working

Kind: TypeAlias = Literal["replicated", "per_worker", "partitioned", "opaque"]
"""``replicated``: bitwise equal on all peers. ``per_worker``: each its own. ``partitioned``: one owner per element.
``opaque``: of any shape, equal on all peers, and good for one way of cutting the model only; can be begun anew.
"""

Tensors: TypeAlias = dict[str, dict[str, Tensor]]


class State:
    """Tensors by FQN and name.

    Args:
        kinds: every name that may occur, and how it relates to the peers' tensors of that name.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self.kinds = dict(kinds)
        self.tensors: Tensors = {}
        self._staged: Tensors = {}

    def get(self, fqn: str, name: str, like: Tensor) -> Tensor:
        """The committed tensor; zeros like ``like``, in fp32 or fp64, if there is none yet. Not to be written to."""
        found = self.tensors.get(fqn, {}).get(name)
        return found if found is not None else working(torch.zeros_like(like))

    def known(self, fqn: str, name: str) -> bool:
        """Whether a tensor of this name has been committed."""
        return name in self.tensors.get(fqn, {})

    def branch(self) -> State:
        """For what is under way beside the steps: it reads what is committed here, and commits for itself."""
        branch = State(self.kinds)
        branch.tensors = self.tensors
        return branch

    def stage(self, fqn: str, name: str, value: Tensor) -> None:
        """Make ``value`` what `commit` will store. Raises ``KeyError`` for a name without a declared kind."""
        if name not in self.kinds:
            raise KeyError(f"state {name!r} was not declared; declared are {sorted(self.kinds)}")
        self._staged.setdefault(fqn, {})[name] = value

    def staged(self, fqn: str, name: str) -> Tensor:
        return self._staged[fqn][name]

    def drop(self, fqn: str, name: str) -> None:
        """Forget a tensor that is of no more use, committed or staged."""
        self.tensors.get(fqn, {}).pop(name, None)
        self._staged.get(fqn, {}).pop(name, None)

    def unstage(self, fqn: str) -> None:
        """Forget what is staged for ``fqn``: its step was not made."""
        self._staged.pop(fqn, None)

    def scale(self, names: Collection[str], factor: float) -> None:
        """Multiply what is committed under ``names``."""
        for named in self.tensors.values():
            for name in named.keys() & set(names):
                named[name] = named[name] * factor

    def commit(self) -> None:
        for fqn, named in self._staged.items():
            self.tensors.setdefault(fqn, {}).update(named)
        self._staged = {}

    def rollback(self) -> None:
        self._staged = {}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace everything by copies of ``tensors``. Raises ``KeyError`` for an undeclared name."""
        unknown = {name for named in tensors.values() for name in named} - set(self.kinds)
        if unknown:
            raise KeyError(f"the state to load holds {sorted(unknown)}, this sync keeps {sorted(self.kinds)}")
        self.tensors = {fqn: {name: t.clone() for name, t in named.items()} for fqn, named in tensors.items()}
        self._staged = {}
