"""Several optimizers over one model as one: each steps its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from dtrain.comm.inner_optimizers.muon import MatrixPiece, Run, WholeMatrices
from dtrain.comm.layout import Segment
from dtrain.comm.ops import Place


class Chained(torch.optim.Optimizer):
    """See `chain`. Its groups and its state are those of its members, not copies."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(_parameters(members), {})
        del self.param_groups  # made by torch, of the parameters alone
        self.members = tuple(members)
        self.state: Any = _States(self.members)

    def __getattr__(self, name: str) -> Any:
        members = vars(self).get("members", ())
        if members and name == "param_groups":
            return [group for member in members for group in member.param_groups]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = _States(self.members)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chosen = {id(group) for group in self.param_groups}  # DeepSpeed sets it, to step one group at a time
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ``TypeError``: only a member can step new parameters."""
        if "members" in vars(self):
            raise TypeError(
                f"which of {len(self.members)} optimizers is to step the new parameters? add the group to one of its "
                "members: optimizer.members[0].add_param_group(...)"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As one optimizer's: the groups of all members behind each other, parameters numbered through."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        for member, begin in zip(self.members, self._begins(), strict=True):
            own = member.state_dict()
            for key, values in own[
                "state"
            ].items():  # a tensor that DeepSpeed has taken out of the groups is its own key
                state[key + begin if isinstance(key, int) else key] = values
            groups += [{**group, "params": [n + begin for n in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ``ValueError`` for the state of optimizers with other groups."""
        state, groups = state_dict["state"], state_dict["param_groups"]
        numbers = [len(group["params"]) for member in self.members for group in member.param_groups]
        if [len(group["params"]) for group in groups] != numbers:
            raise ValueError(
                f"the state to load has groups of {[len(group['params']) for group in groups]} parameters, and here "
                f"they are of {numbers}; give chain() the optimizers of the run that saved it, in the same order"
            )
        first = 0
        for member in self.members:
            own = groups[first : first + len(member.param_groups)]
            first += len(member.param_groups)
            ids = [number for group in own for number in group["params"]]  # as the saved groups have them
            new = {number: position for position, number in enumerate(ids)}
            member.load_state_dict(
                {
                    "state": {new[number]: values for number, values in state.items() if number in new},
                    "param_groups": [{**group, "params": [new[n] for n in group["params"]]} for group in own],
                }
            )
        vars(self).pop("param_groups", None)  # set by DeepSpeed; the members have new groups now
        self.state.update({key: values for key, values in state.items() if isinstance(key, Tensor)})

    def _begins(self) -> Iterator[int]:
        """The number of each member's first parameter."""
        begin = 0
        for member in self.members:
            yield begin
            begin += len(_parameters([member]))

    def stepping(self, group: Mapping[str, Any]) -> torch.optim.Optimizer:
        """The member that steps ``group``, one of ``param_groups``."""
        return next(member for member in self.members if any(group is its for its in member.param_groups))

    # ---- whole matrices --------------------------------------------------------------------------------------------

    def steps_matrices(self, group: Mapping[str, Any]) -> bool:
        member = self.stepping(group)
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
        member = self.stepping(group)
        return member.state_names(group) if isinstance(member, WholeMatrices) else None

    def _of_matrices(self) -> list[WholeMatrices]:
        return [member for member in self.members if isinstance(member, WholeMatrices)]


def chain(*optimizers: torch.optim.Optimizer) -> Chained:
    """Several optimizers over one model as one, for what takes one: a DeepSpeed engine, a scheduler of all their rates.

    ``attach(model, [first, second], sync)`` does the same.

    Args:
        optimizers: with no parameter in common, for example torch's ``Muon`` for matrices and ``AdamW`` for the rest.

    >>> from torch.optim import SGD
    >>> both = chain(SGD([torch.zeros(1)], lr=0.1), SGD([torch.zeros(2)], lr=0.2))
    >>> [group["lr"] for group in both.param_groups]
    [0.1, 0.2]

    Raises ``ValueError`` for none, and for a parameter that two of them step; ``TypeError`` for what is no optimizer.
    """
    if not optimizers:
        raise ValueError("chain() got no optimizer; give those of the model")
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"chain() got a {type(optimizer).__name__}; give torch.optim.Optimizers")
    parameters = _parameters(optimizers)
    if len({id(p) for p in parameters}) < len(parameters):
        seen: set[int] = set()
        twice = next(p for p in parameters if id(p) in seen or seen.add(id(p)))  # type: ignore[func-returns-value]
        raise ValueError(
            f"a parameter of shape {tuple(twice.shape)} is in two of the optimizers, which would both step it; give "
            "each parameter to one"
        )
    return Chained(optimizers)


def with_members(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """``optimizer``, and its members where it is several `chain`."""
    return (optimizer, *optimizer.members) if isinstance(optimizer, Chained) else (optimizer,)


def states_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> MutableMapping[Tensor, dict[str, Any]]:
    """The states by parameter where ``optimizer`` keeps those of ``group``, one of its ``param_groups``."""
    return optimizer.stepping(group).state if isinstance(optimizer, Chained) else optimizer.state


def muons(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Those of `with_members` whose class is called Muon or derives from one: dtrain's, torch's, another package's."""
    return [one for one in with_members(optimizer) if any(base.__name__ == "Muon" for base in type(one).__mro__)]


class _States(MutableMapping[Tensor, dict[str, Any]]):
    """The states of all members, by parameter."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self._members = members

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        return self._of(parameter)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in member.state for member in self._members)

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        return next((member.state[parameter] for member in self._members if parameter in member.state), default)

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

    def _of(self, parameter: Tensor) -> MutableMapping[Tensor, dict[str, Any]]:
        for member in self._members:  # DeepSpeed takes tensors with a state out of the groups
            if parameter in member.state or any(parameter is p for p in _parameters([member])):
                return member.state
        raise KeyError(f"no optimizer here steps a tensor of shape {tuple(parameter.shape)}")


def _parameters(members: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    return [p for member in members for group in member.param_groups for p in group["params"]]
