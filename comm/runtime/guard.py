"""A method's guard: compares what the method declares equal on all replicas, and repairs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from torch import Tensor

from dtrain.comm.runtime.consistency import ABSENT, PARAMETER, Held, ReplicasDiffer, Tie, Verdict, compared
from dtrain.comm.runtime.context import Context


def parameters_held(context: Context) -> Held:
    """The parameters, one by one, for methods that keep them equal on all replicas."""
    for fqn in context.pieces.segments:
        yield PARAMETER + fqn, context.pieces.read([fqn], copy=False)[fqn]


def state_held(context: Context) -> Held:
    """What the state declares replicated."""
    state = context.state
    names = sorted(name for name, kind in state.kinds.items() if kind == "replicated")
    for fqn in sorted(state.tensors):
        for name in names:
            if name in state.tensors[fqn]:
                yield f"{name} of {fqn}", state.tensors[fqn][name]


def take_over(context: Context, held: Callable[[], Held], values: Mapping[str, Tensor]) -> None:
    """Overwrite what is wrong on this rank by ``values``, named as in ``held``. Every rank must call it."""
    for name, tensor in held():
        if name in values and not name.startswith(PARAMETER):
            tensor.copy_(values[name])
    parameters = {name.removeprefix(PARAMETER): value for name, value in values.items() if name.startswith(PARAMETER)}
    context.pieces.write({**context.pieces.read(), **parameters})


class Guard:
    """Compares and repairs.

    Args:
        held: what must be equal on all replicas now; not copied, but for parameters. May be called twice.
        means: what that is, for messages.
        words: what else must be equal, as text.
        replace: overwrites what is wrong on this rank, by names of ``held``; by default `take_over`.
    """

    def __init__(
        self,
        context: Context,
        tie: Tie,
        means: str,
        held: Callable[[], Held],
        *,
        words: Callable[[], str] = lambda: "",
        replace: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        self._context, self._tie, self._means, self._held, self._words = context, tie, means, held, words
        self._replace = replace

    def verify(self, *, absent: bool = False) -> bool:
        """Compare what must be equal on all replicas, and repair it; True if it was equal. Every rank must call it.

        ``absent``: this rank had no part in the last step, and is not compared. Raises `ReplicasDiffer`, see
        `Attached.verify`.
        """
        context, size = self._context, self._context.place.size
        verdict = context.membership.compared(lambda: self._compared(absent))
        flags = context.over_shards(verdict.flags(size), "agree")
        wrong, problems = [rank for rank in range(size) if flags[rank]], flags[size:]
        if bool(problems.any()):
            raise ReplicasDiffer(f"step {context.steps}: {verdict.refusal(problems, self._means, context.saves)}")
        if wrong:
            if self._replace is None:
                take_over(context, self._held, verdict.values)
            else:
                self._replace(verdict.values)
            context.repairs += 1
            warnings.warn(
                f"step {context.steps}: what must be equal on all replicas ({self._means}) differed on replicas "
                f"{wrong} and was replaced by the others'; {verdict.first}look at their memory and processors",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip
        return not wrong

    def _compared(self, absent: bool) -> Verdict:
        context = self._context
        saves = context.membership.saves_alike(context.saves) if context.differs_by_rank else 0
        flow = compared(self._held, self._words(), ABSENT if absent else saves, context.place, self._tie)
        return context.pieces.channel.run(flow, "guard")
