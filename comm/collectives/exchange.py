"""An exchange: combine values over the peers, each compressed as its plan says. The one flow that every method calls.

Values that are coded by rows take a route (`routes`); matrices of a compressor in two rounds go through means of their
factors (`low_rank`). Flows that run at the same time share their messages (`together`): PowerSGD's first factors go
with all that is not a matrix, and what is gathered from all ranks with the second phase of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar, cast

from torch import Tensor

from dtrain.comm.aggregators.mean import Aggregator, rank_order_mean
from dtrain.comm.collectives.all_gather import all_gathered
from dtrain.comm.collectives.all_reduce import native_mean
from dtrain.comm.collectives.low_rank import low_rank_mean
from dtrain.comm.collectives.routes import ROUTES, Route, of_the_mean, route_of
from dtrain.comm.collectives.two_phase import Combined, two_phase
from dtrain.comm.compressors.compressor import is_sparse
from dtrain.comm.compressors.lossless import packed, require_zstandard
from dtrain.comm.feedback import Compression, as_compression
from dtrain.comm.layout import Matrix, Named
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Flow, Op, Payload, Place
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State

R = TypeVar("R")
NO_MATRICES: Mapping[str, Matrix] = MappingProxyType({})


def exchange(
    values: Named,
    plan: Plan,
    rule: Aggregator,
    place: Place,
    key: Key,
    state: State,
    *,
    matrices: Mapping[str, Matrix] = NO_MATRICES,
    route: Route = "auto",
    lossless: int | None = None,
    weight: float | None = None,
    present: bool | None = None,
) -> Flow[Combined]:
    """Combine flat fp32 ``values`` over the peers by ``rule``. New state is staged in ``state``.

    ``matrices`` says how each piece lies in its parameter; compressors in two rounds need it. ``route``: see `routes`;
    the rule of "all_reduce" is the mean. ``lossless``: zstandard's level, for what is sent. ``weight`` and
    ``present``: of this rank, see `two_phase`.
    """
    chosen = {fqn: plan.of(fqn, key.step) for fqn in values}
    in_two_rounds = {
        fqn: compressor
        for fqn, compression in chosen.items()
        if (compressor := compression.two_rounds) is not None and compressor.pays(matrices[fqn])
    }

    def send(group: Named, using: Plan, usable: bool = True) -> list[Flow[Combined]]:
        if route == "all_reduce":
            return [native_mean(group, using, key, state, weight, present, usable)]
        if route == "two_phase" or (route == "auto" and not _any_sparse(group, using, key.step)):
            return [two_phase(group, using, rule, place, key, state, weight, present, usable)]
        to_all, to_owners = _by_route(group, using, key.step, place.size, route)
        flows = []
        if to_owners or not to_all:  # one flow at least: ranks vote even on nothing
            wider = partial(of_the_mean, world=place.size, route=route)
            flows.append(two_phase(to_owners, using, rule, place, key, state, weight, present, usable, wider))
        if to_all:
            flows.append(all_gathered(to_all, using, rule, place, key, state, weight, present, usable))
        return flows

    def dense_mean(group: Named, usable: bool) -> Flow[Combined]:
        return _merged(together(send(group, as_compression(None), usable)), list(group))

    by_row = {fqn: value for fqn, value in values.items() if fqn not in in_two_rounds}
    flows = []
    if in_two_rounds:
        feedbacks = {fqn: chosen[fqn].feedback for fqn in in_two_rounds}
        low_rank = {fqn: values[fqn] for fqn in in_two_rounds}
        flows.append(
            low_rank_mean(low_rank, in_two_rounds, feedbacks, matrices, dense_mean, key, state, counts=weight != 0)
        )
    if by_row or not in_two_rounds:
        flows += send(by_row, _ByRow(plan))
    return (yield from packed(_merged(together(flows), list(values)), lossless))


def _any_sparse(values: Named, plan: Plan, step: int) -> bool:
    return any(is_sparse(plan.of(fqn, step).by_row) for fqn in values)


def _by_route(
    values: Named, plan: Plan, step: int, world: int, route: Route
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is gathered from all ranks, and what goes through owners."""
    to_all = {fqn for fqn in values if route_of(plan.of(fqn, step), world, route) == "all_gather"}
    return (
        {fqn: value for fqn, value in values.items() if fqn in to_all},
        {fqn: value for fqn, value in values.items() if fqn not in to_all},
    )


def _merged(groups: Flow[list[Combined]], fqns: list[str]) -> Flow[Combined]:
    """What several flows of one exchange have combined, as one, in the order of ``fqns``."""
    parts = yield from groups
    combined = {fqn: tensor for part in parts for fqn, tensor in part.values.items()}
    return Combined({fqn: combined[fqn] for fqn in fqns}, all(part.finite for part in parts), parts[0].present)


class _ByRow:
    """A plan of compressors that code rows: those of another plan, and fp32 for matrices for which two rounds do not
    pay.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.compressions = plan.compressions

    def of(self, fqn: str, step: int) -> Compression:
        compression = self.plan.of(fqn, step)
        return compression if compression.by_row is not None else as_compression(None)


def require_mean_for_low_rank(plan: Plan, rule: Aggregator) -> None:
    """Raise ``ValueError`` for a compressor in two rounds and a rule other than the mean, ``TypeError`` for no rule."""
    if not callable(rule):
        raise TypeError(f"combine is {rule!r}; give a rule, rows [world, n] -> [n], such as mean()")
    low_rank = next((c.two_rounds for c in plan.compressions if c.two_rounds is not None), None)
    if low_rank is not None and rule is not rank_order_mean:
        raise ValueError(
            f"{low_rank} combines factors, of which only a mean makes sense; leave combine out, or choose another "
            "compressor"
        )


def require_route(plan: Plan, rule: Aggregator, route: Route, *, weighted: bool = False) -> None:
    """Raise ``ValueError`` for a route that ``plan`` cannot take, above all for what a native all-reduce cannot sum.

    ``weighted``: replicas may weigh differently.
    """
    if route not in ROUTES:
        raise ValueError(f"route is {route!r}; choose {', '.join(map(repr, ROUTES[:-1]))} or {ROUTES[-1]!r}")
    if route == "sparse_all_reduce" and not any(is_sparse(compression.by_row) for compression in plan.compressions):
        compressors = " and ".join(sorted({f"{compression.compressor}" for compression in plan.compressions}))
        raise ValueError(
            f"route='sparse_all_reduce' is for sparse compressors such as topk, not for {compressors}; leave route out"
        )
    if route != "all_reduce":
        return
    for compression in plan.compressions:
        compressor = compression.by_row
        if compressor is None:
            continue
        if not compressor.linear:
            raise ValueError(
                f"{compressor} is not linear, so an all-reduce cannot sum its payloads; use route='two_phase'"
            )
        if compressor.row_bytes(1) == 4:
            continue
        if weighted:
            raise ValueError(f"an all-reduce of {compressor} cannot weigh replicas; use route='two_phase'")
        if compression.feedback.feeds_back:
            raise ValueError(
                f"an all-reduce of {compressor} rounds sums where no feedback sees it; use route='two_phase'"
            )
    if rule is not rank_order_mean:
        raise ValueError("an all-reduce has only the mean to offer; use route='two_phase' with another rule")


def require_codable(lossless: int | None, route: Route) -> None:
    """Raise ``ValueError`` for a level that zstandard does not know, or a route that has no messages to code."""
    if lossless is None:
        return
    require_zstandard(lossless)
    if route == "all_reduce":
        raise ValueError("lossless codes messages, which an all-reduce has to add up; use route='two_phase'")


def consolidate(state: State, place: Place, key: Key) -> Flow[None]:
    """Replace each replica's ``per_worker`` state by the mean over the replicas."""
    names = {name for name, kind in state.kinds.items() if kind == "per_worker"}
    values = {f"{name} of {f}": t for f, named in state.tensors.items() for name, t in named.items() if name in names}
    means = yield from two_phase(values, as_compression(None), rank_order_mean, place, key, state)
    for label, value in means.values.items():
        name, _, fqn = label.partition(" of ")
        state.stage(fqn, name, value.clone())
    state.commit()


def together(flows: Sequence[Flow[R]]) -> Flow[list[R]]:
    """Run several flows in step, the ops of each turn as one message. Returns their results, in order.

    They may have different numbers of ops. Ops of another kind than the first flow's wait for a later turn.
    """
    results: list[R | None] = [None] * len(flows)
    replies: dict[int, Payload | None] = dict.fromkeys(range(len(flows)))
    ops: dict[int, Op] = {}
    while True:
        for number, reply in replies.items():
            try:
                ops[number] = next(flows[number]) if reply is None else flows[number].send(reply)
            except StopIteration as done:
                results[number] = done.value
        if not ops:
            return cast(list[R], results)
        first = ops[min(ops)]
        turn = [number for number in sorted(ops) if _go_together(ops[number], first)]
        joint = yield _joined([ops[number] for number in turn])
        replies, start = {}, 0
        for number in turn:
            count = len(ops.pop(number).payload)
            replies[number] = joint[start : start + count]
            start += count


def _go_together(one: Op, other: Op) -> bool:
    return type(one) is type(other) and one.axis == other.axis


def _joined(ops: Sequence[Op]) -> Op:
    first = ops[0]
    if len(ops) == 1:
        return first
    if not isinstance(first, AllToAll | AllGather | AllReduce):
        raise TypeError(f"{type(first).__name__} cannot be joined with others")
    return replace(first, payload=tuple(tensor for op in ops for tensor in op.payload))
