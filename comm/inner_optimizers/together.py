"""Several optimizers over one model as one: each steps its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from dtrain.comm.inner_optimizers.muon import MatrixPiece, Run, WholeMatrices
from dtrain.comm.layout import Segment
from dtrain.comm.ops import Place


class Together(torch.optim.Optimizer):
    """See `together`. Its groups and its state are those of its members, not copies."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = tuple(members)
        super().__init__(_parameters(members), {})
        del self.param_groups, self.state  # made by torch, of the parameters alone

    def __getattr__(self, name: str) -> Any:
        members = vars(self).get("members", ())
        if members and name == "param_groups":
            return [group for member in members for group in member.param_groups]
        if members and name == "state":
            return _States(members)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chosen = {id(group) for group in self.param_groups}  # DeepSpeed steps one group at a time
        for member in self.members:
            groups = member.param_groups
            member.param_groups = [group for group in groups if id(group) in chosen]
            try:
                if member.param_groups:
                    member.step()
            finally:
                member.param_groups = groups
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["members"]
        if len(states) != len(self.members):
            raise ValueError(f"the state to load is of {len(states)} optimizers, and here are {len(self.members)}")
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)

    # ---- whole matrices --------------------------------------------------------------------------------------------

    def steps_matrices(self, group: Mapping[str, Any]) -> bool:
        member = self._stepping(group)
        return isinstance(member, WholeMatrices) and member.steps_matrices(group)

    def share(
        self, pieces: Mapping[Tensor, Sequence[MatrixPiece]], held: Sequence[Mapping[str, Segment]], place: Place,
        run: Run, *, whole: bool,
    ) -> None:  # fmt: skip
        for member in self._of_matrices():
            member.share(pieces, held, place, run, whole=whole)

    def share_no_more(self) -> None:
        for member in self._of_matrices():
            member.share_no_more()

    def state_names(self, group: Mapping[str, Any]) -> frozenset[str] | None:
        member = self._stepping(group)
        return member.state_names(group) if isinstance(member, WholeMatrices) else None

    def _stepping(self, group: Mapping[str, Any]) -> torch.optim.Optimizer:
        return next(member for member in self.members if any(group is its for its in member.param_groups))

    def _of_matrices(self) -> list[WholeMatrices]:
        return [member for member in self.members if isinstance(member, WholeMatrices)]


def together(*optimizers: torch.optim.Optimizer) -> Together:
    """Several optimizers over one model as one, for what takes one: a DeepSpeed engine, a scheduler of all their rates.

    ``attach(model, [first, second], sync)`` does the same.

    Args:
        optimizers: with no parameter in common, for example torch's ``Muon`` for matrices and ``AdamW`` for the rest.

    >>> from torch.optim import SGD
    >>> both = together(SGD([torch.zeros(1)], lr=0.1), SGD([torch.zeros(2)], lr=0.2))
    >>> [group["lr"] for group in both.param_groups]
    [0.1, 0.2]

    Raises ``ValueError`` for none, and for a parameter that two of them step; ``TypeError`` for what is no optimizer.
    """
    if not optimizers:
        raise ValueError("together() got no optimizer; give those of the model")
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"together() got a {type(optimizer).__name__}; give torch.optim.Optimizers")
    parameters = _parameters(optimizers)
    if len({id(p) for p in parameters}) < len(parameters):
        seen: set[int] = set()
        twice = next(p for p in parameters if id(p) in seen or seen.add(id(p)))  # type: ignore[func-returns-value]
        raise ValueError(
            f"a parameter of shape {tuple(twice.shape)} is in two of the optimizers, which would both step it; give "
            "each parameter to one"
        )
    return Together(optimizers)


class _States(MutableMapping[Tensor, dict[str, Any]]):
    """The states of all members, by parameter."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self._members = members
        self._by_id = {id(p): member for member in members for p in _parameters([member])}

    def _of(self, parameter: Tensor) -> MutableMapping[Tensor, dict[str, Any]]:
        return self._by_id[id(parameter)].state

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        return self._of(parameter)[parameter]

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        return self._of(parameter).get(parameter, default)

    def __setitem__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        self._of(parameter)[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for member in self._members for parameter in member.state)

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)

    def clear(self) -> None:
        for member in self._members:
            member.state.clear()


def _parameters(members: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    return [p for member in members for group in member.param_groups for p in group["params"]]
