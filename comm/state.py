"""What a method keeps from step to step: ``{fqn: {name: tensor}}``, and the next values, staged.

A step is a transaction. Flows stage their next state while the old one stays as it is; at the end of the step all
ranks agree to `commit` it everywhere or to `rollback` it everywhere. The price is a second copy of what is staged.

A step may exchange one name several times, once for each backward pass. `proceed` begins the next exchange, which reads
what the earlier ones have staged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dtrain.comm.layout import is_finite, working

Kind: TypeAlias = Literal["replicated", "per_worker", "partitioned", "opaque"]
"""``replicated``: bitwise equal on all peers. ``per_worker``: different on each. ``partitioned``: one owner for each
element. ``opaque``: of any shape, equal on all peers, and valid for one way of sharding the model; may be dropped.
"""

Tensors: TypeAlias = dict[str, dict[str, Tensor]]

Numbers: TypeAlias = dict[str, int | float]
"""What is kept from step to step beside tensors, by name: counters, and finite floats, bit-exact."""


class State:
    """Tensors by FQN and name.

    Args:
        kinds: every name that may occur, and how it relates to the peers' tensors of that name.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self.kinds = dict(kinds)
        self.tensors: Tensors = {}
        self._earlier: Tensors = {}  # staged by exchanges of this step that have ended
        self.staging: Tensors = {}  # by the present exchange; callers may read it

    def find(self, fqn: str, name: str) -> Tensor | None:
        """The tensor that an earlier exchange of this step staged, else the committed one. Not to be written to."""
        earlier = self._earlier.get(fqn, {}).get(name)
        return earlier if earlier is not None else self.tensors.get(fqn, {}).get(name)

    def get(self, fqn: str, name: str, like: Tensor) -> Tensor:
        """`find`; zeros like ``like``, in fp32 or fp64, if there is none yet. Not to be written to."""
        tensor = self.find(fqn, name)
        return tensor if tensor is not None else working(torch.zeros_like(like))

    def proceed(self, fqns: Collection[str]) -> None:
        """Begin another exchange of ``fqns`` in this step, which reads what the last one has staged."""
        for fqn in fqns:
            self._earlier.setdefault(fqn, {}).update(self.staging.pop(fqn, {}))

    def begun(self, fqn: str, name: str) -> bool:
        """Whether an earlier exchange of this step has staged a tensor of this name."""
        return name in self._earlier.get(fqn, {})

    def branch(self) -> State:
        """For an exchange that overlaps steps: it reads and commits to the same tensors, and has its own staging."""
        branch = State(self.kinds)
        branch.tensors = self.tensors
        return branch

    def look(self) -> State:
        """A state that reads what `find` reads here, for values that are never committed."""
        look = self.branch()
        look._earlier = self._earlier
        return look

    def stage(self, fqn: str, name: str, value: Tensor) -> None:
        """Make ``value`` what `commit` will store. Raises ``KeyError`` for a name without a declared kind."""
        if name not in self.kinds:
            raise KeyError(f"state {name!r} was not declared; declared are {sorted(self.kinds)}")
        self.staging.setdefault(fqn, {})[name] = value

    def staged(self, fqn: str, name: str) -> Tensor:
        return self.staging[fqn][name]

    def put(self, fqn: str, name: str, value: Tensor) -> None:
        """Store ``value`` at once, without stage and commit: the same values in other memory, or a result that arrived.

        Raises ``KeyError`` for a name without a declared kind.
        """
        if name not in self.kinds:
            raise KeyError(f"state {name!r} was not declared; declared are {sorted(self.kinds)}")
        self.tensors.setdefault(fqn, {})[name] = value

    def drop(self, fqn: str, name: str) -> None:
        """Delete a tensor, committed or staged."""
        for tensors in (self.tensors, self._earlier, self.staging):
            tensors.get(fqn, {}).pop(name, None)

    def unstage(self, fqn: str) -> None:
        """Discard what is staged for ``fqn``: its step was not made."""
        self._earlier.pop(fqn, None)
        self.staging.pop(fqn, None)

    def scale(self, names: Collection[str], factor: float) -> None:
        """Multiply what is committed under ``names``."""
        for named in self.tensors.values():
            for name in named.keys() & set(names):
                named[name] = named[name] * factor

    def commit(self) -> None:
        for staged in (self._earlier, self.staging):
            for fqn, named in staged.items():
                self.tensors.setdefault(fqn, {}).update(named)
        self.rollback()

    def rollback(self) -> None:
        self._earlier, self.staging = {}, {}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace everything by copies of ``tensors``.

        Raises ``KeyError`` for an undeclared name, ``ValueError`` for values that are not finite.
        """
        unknown = {name for named in tensors.values() for name in named} - set(self.kinds)
        if unknown:
            raise KeyError(f"the state to load holds {sorted(unknown)}, this sync keeps {sorted(self.kinds)}")
        for fqn, named in tensors.items():
            for name, tensor in named.items():
                if not is_finite(tensor):
                    raise ValueError(
                        f"{name!r} of {fqn} in the state to load is not finite, so no step could be made from it; go "
                        "back to an earlier checkpoint, or take that tensor out to begin it anew"
                    )
        self.tensors = {fqn: {name: t.clone() for name, t in named.items()} for fqn, named in tensors.items()}
        self.rollback()
