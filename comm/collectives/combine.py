"""Combine values over the peers, each as its plan says: the one flow that every sync calls.

Pieces that are coded row by row go through a route (`routes`), low-rank ones through two rounds of factors. What goes
out at the same time goes out as one message (`together`): PowerSGD's first factors with all that is not a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import Aggregator, rank_order_mean
from dtrain.comm.collectives.two_phase import Combined, native_mean, two_phase
from dtrain.comm.compressors.lossless import packed
from dtrain.comm.compressors.lowrank import LowRank, Matrix, orthonormal
from dtrain.comm.feedback import Compression, NoFeedback, as_compression
from dtrain.comm.layout import Named, is_finite, is_keepable
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Flow, Op, Payload, Place
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State

R = TypeVar("R")
Route: TypeAlias = Literal["two_phase", "all_reduce"]
NO_MATRICES: Mapping[str, Matrix] = MappingProxyType({})
Dense: TypeAlias = Callable[[Named, bool], Flow[Combined]]


def combine(
    values: Named,
    plan: Plan,
    rule: Aggregator,
    place: Place,
    key: Key,
    state: State,
    *,
    matrices: Mapping[str, Matrix] = NO_MATRICES,
    route: Route = "two_phase",
    lossless: int | None = None,
    weight: float | None = None,
    present: bool | None = None,
) -> Flow[Combined]:
    """Combine flat fp32 ``values`` over the peers by ``rule``. New state is staged in ``state``.

    ``matrices`` says how each piece lies in its parameter; low rank needs it. The rule of the route "all_reduce" is the
    mean. ``lossless``: zstandard's level, for what is sent. ``weight`` and ``present``: of this rank, see `two_phase`.
    """
    chosen = {fqn: plan.of(fqn, key.step) for fqn in values}
    low = {fqn: values[fqn] for fqn in values if _low_rank(chosen[fqn], fqn, matrices)}
    rest = {fqn: value for fqn, value in values.items() if fqn not in low}
    rows = _Rows(plan)

    def send(part: Named, using: Plan, usable: bool = True) -> Flow[Combined]:
        if route == "all_reduce":
            return native_mean(part, using, key, state, weight, present, usable)
        return two_phase(part, using, rule, place, key, state, weight, present, usable)

    def dense(part: Named, usable: bool) -> Flow[Combined]:
        return send(part, as_compression(None), usable)

    if not low:
        flow = send(rest, rows)
        return (yield from (flow if lossless is None else packed(flow, lossless)))
    flows = [_power_iteration(low, chosen, key, state, matrices, dense, weight != 0)]
    if rest:
        flows.append(send(rest, rows))
    joint = together(flows)
    parts = yield from (joint if lossless is None else packed(joint, lossless))
    found = {fqn: tensor for part in parts for fqn, tensor in part.values.items()}
    return Combined({fqn: found[fqn] for fqn in values}, all(part.finite for part in parts), parts[0].present)


def require_mean_for_low_rank(plan: Plan, rule: Aggregator) -> None:
    """Raise ``ValueError`` for a rule over factors that mean nothing one by one, ``TypeError`` for what is no rule."""
    if not callable(rule):
        raise TypeError(f"combine is {rule!r}; give a rule, rows [world, n] -> [n], such as mean()")
    low = next((c.compressor for c in plan.compressions if isinstance(c.compressor, LowRank)), None)
    if low is not None and rule is not rank_order_mean:
        raise ValueError(
            f"{low} combines factors, of which only a mean makes sense; leave combine out, or choose another compressor"
        )


def require_summable(plan: Plan, rule: Aggregator, route: Route, *, weighted: bool = False) -> None:
    """Raise ``ValueError`` for what a native all-reduce cannot carry. ``weighted``: replicas count differently."""
    if route not in ("two_phase", "all_reduce"):
        raise ValueError(f"route is {route!r}; choose 'two_phase' or 'all_reduce'")
    if route == "two_phase":
        return
    for compression in plan.compressions:
        compressor = compression.compressor
        if isinstance(compressor, LowRank):
            continue
        if not compressor.linear:
            raise ValueError(
                f"{compressor} is not linear, so an all-reduce cannot sum its payloads; use route='two_phase'"
            )
        if compressor.row_bytes(1) == 4:
            continue
        if weighted:
            raise ValueError(f"an all-reduce of {compressor} cannot weigh replicas; use route='two_phase'")
        if not isinstance(compression.feedback, NoFeedback):
            raise ValueError(
                f"an all-reduce of {compressor} rounds sums where no feedback sees it; use route='two_phase'"
            )
    if rule is not rank_order_mean:
        raise ValueError("an all-reduce has only the mean to offer; use route='two_phase' with another rule")


class _Rows:
    """A plan of row-wise compressions: those of another, and fp32 for what low rank does not pay for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.compressions = plan.compressions

    def of(self, fqn: str, step: int) -> Compression:
        compression = self.plan.of(fqn, step)
        return as_compression(None) if isinstance(compression.compressor, LowRank) else compression


def _low_rank(compression: Compression, fqn: str, matrices: Mapping[str, Matrix]) -> bool:
    return isinstance(compression.compressor, LowRank) and compression.compressor.pays(matrices[fqn])


def _power_iteration(
    values: Named,
    chosen: Mapping[str, Compression],
    key: Key,
    state: State,
    matrices: Mapping[str, Matrix],
    dense: Dense,
    counts: bool,
) -> Flow[Combined]:
    """PowerSGD of all ``values`` at once: two dense means, of P and of Q. ``counts``: whether this rank is in them."""
    usable = is_keepable(*values.values())
    counts = counts and usable
    if counts:
        meant = {fqn: chosen[fqn].feedback.correct(fqn, value, state) for fqn, value in values.items()}
        usable = is_finite(*meant.values())
    else:
        meant = {fqn: torch.zeros_like(value) for fqn, value in values.items()}
    whole = {fqn: matrices[fqn].view(value) for fqn, value in meant.items()}
    starts, shapes = {}, {}
    for fqn, matrix in whole.items():
        compressor = cast(LowRank, chosen[fqn].compressor)
        starts[fqn] = compressor.start(matrices[fqn], replace(key, fqn=fqn), state, matrix)
        shapes[fqn] = (compressor.rank, matrix.shape[0])
    # Thin matrices come first in products, and go transposed: with a thin one last CPUs take four times as long.
    means = yield from dense({fqn: (starts[fqn].T @ matrix.T).reshape(-1) for fqn, matrix in whole.items()}, usable)
    bases = {fqn: orthonormal(mean.view(shapes[fqn]).T) for fqn, mean in means.values.items()}
    own = {fqn: bases[fqn].T @ matrix for fqn, matrix in whole.items()}  # Q_i^T [rank, columns]
    factors = yield from dense({fqn: factor.reshape(-1) for fqn, factor in own.items()}, usable)
    results: dict[str, Tensor] = {}
    for fqn, value in values.items():
        feedback, factor, lies = chosen[fqn].feedback, factors.values[fqn].view(own[fqn].shape), matrices[fqn]
        if not counts:
            feedback.sit_out(fqn, value, state)
        elif feedback.kinds:
            feedback.retain_product(fqn, value, meant[fqn], lies, (bases[fqn], own[fqn]), state)
        # From zeros no iteration would ever start again.
        state.stage(fqn, "q", factor.T.contiguous() if bool(factor.any()) else starts[fqn])
        results[fqn] = feedback.result(fqn, lies.flat(bases[fqn] @ factor), state)
    return Combined(results, means.finite and factors.finite, means.present)


def consolidate(state: State, place: Place, key: Key) -> Flow[None]:
    """Replace what each worker keeps for itself by the mean over the workers."""
    names = {name for name, kind in state.kinds.items() if kind == "per_worker"}
    kept = {f"{name} of {f}": t for f, named in state.tensors.items() for name, t in named.items() if name in names}
    means = yield from two_phase(kept, as_compression(None), rank_order_mean, place, key, state)
    for which, value in means.values.items():
        name, _, fqn = which.partition(" of ")
        state.stage(fqn, name, value.clone())
    state.commit()


def together(flows: Sequence[Flow[R]]) -> Flow[list[R]]:
    """Several flows as one: what they send at the same time is one message. Returns their results, in order.

    They may have different numbers of ops, but those at the same place must be of one kind.
    """
    results: list[R | None] = [None] * len(flows)
    replies: dict[int, Payload | None] = dict.fromkeys(range(len(flows)))
    while replies:
        ops: dict[int, Op] = {}
        for number, reply in replies.items():
            try:
                ops[number] = next(flows[number]) if reply is None else flows[number].send(reply)
            except StopIteration as done:
                results[number] = done.value
        if not ops:
            break
        joint = yield _joined(list(ops.values()))
        replies, start = {}, 0
        for number, op in ops.items():
            replies[number] = joint[start : start + len(op.payload)]
            start += len(op.payload)
    return cast(list[R], results)


def _joined(ops: Sequence[Op]) -> Op:
    first = ops[0]
    if len(ops) == 1:
        return first
    if any(type(op) is not type(first) or op.axis != first.axis for op in ops):
        raise TypeError(f"flows that go together must send alike, these send {[type(op).__name__ for op in ops]}")
    if not isinstance(first, AllToAll | AllGather | AllReduce):
        raise TypeError(f"{type(first).__name__} cannot be joined with others")
    return replace(first, payload=tuple(tensor for op in ops for tensor in op.payload))
