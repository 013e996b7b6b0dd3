"""Sparse routes: plain top-k by an all-gather, an owner with room for several ranks, votes, weights, and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain import dgc, diloco, every_step
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.collectives.routes import ROUTES, TWO_PAY, UNION, Route, described, of_the_mean, route_bytes, route_of
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.feedback import Compression, as_compression
from dtrain.comm.ops import Place
from dtrain.comm.plans.plan import Compress, as_plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.meter import Meter, metered
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import cast, compeft, ef21, error_feedback, powersgd, projection, quantize, randk, topk
from dtrain.plans import after, by_layer
from dtrain.testing.replicas import Replicas, equal, quadratic
from tests.comm.zoo import bits, draw, fresh_states, named, per_rank, plain, seeds, square

SPARSE: tuple[Route, ...] = ("all_gather", "sparse_all_reduce")
Values = Sequence[dict[str, Tensor]]


def run(
    values: Values, plan: Compress, route: Route, states: Sequence[State] | None = None, *, steps: Sequence[int] = (),
    weights: Sequence[float] = (), present: Sequence[bool | None] = (), meters: Sequence[Meter] = (),
) -> list[Combined]:  # fmt: skip
    """One exchange; what differs by rank is given for each rank, or left out."""
    world, plan = len(values), as_plan(plan)
    states = fresh_states(plan, world) if states is None else states
    flows = [
        exchange(
            values[r], plan, rank_order_mean, Place(r, world), Key(0, steps[r] if steps else 0, r), states[r],
            matrices=square(values[r]), route=route, weight=weights[r] if weights else None,
            present=present[r] if present else None,
        )
        for r in range(world)
    ]  # fmt: skip
    if meters:
        places = [{"replicate": Place(r, world), "shard": Place(0, 1)} for r in range(world)]
        flows = [metered(flow, meters[r], places[r], "x") for r, flow in enumerate(flows)]  # type: ignore[arg-type]
    return simulate(flows)


def largest(value: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(value)
    indices = value.abs().topk(k).indices
    kept[indices] = value[indices]
    return kept


# ---- what they compute -----------------------------------------------------------------------------------------------


def test_the_all_gather_is_the_mean_of_each_ranks_own_largest_and_feedback_keeps_the_rest() -> None:
    plan, world = error_feedback(topk(0.1)), 4
    states, errors = fresh_states(plan, world), [torch.zeros(200)] * world
    for step in range(5):
        values = [{"w": draw(10 * step + rank, 200)} for rank in range(world)]
        corrected = [mine["w"] + error for mine, error in zip(values, errors, strict=True)]
        sent = [largest(value, 20) for value in corrected]
        errors = [value - part for value, part in zip(corrected, sent, strict=True)]
        for combined in run(values, plan, "all_gather", states):
            assert torch.equal(combined.values["w"], rank_order_mean(torch.stack(sent)))
        for state, error in zip(states, errors, strict=True):
            state.commit()
            assert torch.equal(state.tensors["w"]["residual"], error)


@given(st.integers(1, UNION), seeds, st.sampled_from([0.02, 0.1, 0.5]))
@settings(max_examples=20)
def test_the_sparse_all_reduce_loses_nothing_among_as_many_ranks_as_it_has_room_for(
    world: int, seed: int, density: float
) -> None:
    values = per_rank(seed, [131, 60], world)
    found = run(values, topk(density), "sparse_all_reduce")[0].values
    for fqn, value in found.items():
        width = -(-value.numel() // world)
        k = math.ceil(density * width)
        rows = torch.stack([torch.nn.functional.pad(mine[fqn], (0, world * width - value.numel())) for mine in values])
        sent = torch.stack([torch.cat([largest(chunk, k) for chunk in row.view(world, width)]) for row in rows])
        assert torch.equal(value, rank_order_mean(sent)[: value.numel()])


def test_among_more_ranks_an_owner_keeps_what_does_not_fit() -> None:
    plan, world = error_feedback(topk(0.01)), 8
    states = fresh_states(plan, world)
    values = [{"w": draw(rank, 8000)} for rank in range(world)]
    found = run(values, plan, "sparse_all_reduce", states)[0].values["w"]
    assert int((found != 0).sum()) == UNION * 80  # of up to 8 * 80 elements that the ranks have sent
    left = torch.stack([state.staging["w"]["residual"] for state in states]).double().mean(0)
    meant = torch.stack([mine["w"] for mine in values]).double().mean(0)
    assert torch.allclose(found.double() + left, meant, atol=1e-6)


def test_weights_count_as_on_the_two_phase_route() -> None:
    """In fp32, which loses nothing on either: bit for bit, whoever is left out."""
    values = per_rank(3, [7, 61], 4)
    for weights in ([1, 1, 1, 1], [3, 1, 2, 5], [3, 0, 3, 3], [0, 2, 0, 5], [0, 0, 0, 0]):
        one, other = (run(values, as_compression(None), r, weights=weights) for r in ("two_phase", "all_gather"))
        assert [found.finite for found in one] == [found.finite for found in other] == [any(weights)] * 4
        if any(weights):
            for mine, theirs in zip(one, other, strict=True):
                assert all(torch.equal(bits(mine.values[fqn]), bits(theirs.values[fqn])) for fqn in mine.values)


@pytest.mark.parametrize("route", ["two_phase", *SPARSE])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_weighted_rank_that_is_not_finite_is_left_out_and_keeps_its_residual(route: Route, bad: float) -> None:
    plan = error_feedback(topk(0.3))
    states = fresh_states(plan, 3)
    run(per_rank(1, [61], 3), plan, route, states, weights=[1, 2, 3])
    for state in states:
        state.commit()
    before = states[1].tensors["layers.0.weight"]["residual"].clone()
    values = per_rank(2, [61], 3)
    values[1]["layers.0.weight"][5] = bad
    first, *others = run(values, plan, route, states, weights=[1, 2, 3])
    assert first.finite and all(torch.equal(first.values[f], other.values[f]) for other in others for f in first.values)
    kept = states[1].staging["layers.0.weight"]["residual"]
    if route == "all_gather":
        assert torch.equal(kept, before)
        alone = [values[0], {f: torch.zeros_like(v) for f, v in values[1].items()}, values[2]]
        for state in states:
            state.rollback()
        wanted = run(alone, plan, route, states, weights=[1, 0, 3])[0]
        assert torch.equal(first.values["layers.0.weight"], wanted.values["layers.0.weight"])


@pytest.mark.parametrize("route", ["two_phase", *SPARSE])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_rank_whose_next_state_would_not_be_finite_fails_the_exchange_on_all(route: Route, weighted: bool) -> None:
    plan = error_feedback(topk(0.1))
    states = fresh_states(plan, 3)
    values = [{"layers.0.weight": torch.ones(61)} for _ in range(3)]
    states[2].put("layers.0.weight", "residual", torch.full((61,), math.inf))
    found = run(values, plan, route, states, weights=[1, 2, 1] if weighted else ())
    assert [combined.finite for combined in found] == [False] * 3


# ---- votes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["two_phase", *SPARSE])
@pytest.mark.parametrize("plan", [topk(0.2), by_layer({"*.0.*": None}, default=topk(0.2))])
def test_whether_any_rank_was_present(route: Route, plan: Any) -> None:
    values = per_rank(1, [7, 61], 3)
    for present in ([True, False, False], [False] * 3, [True] * 3, [None] * 3):
        wanted = any(here is not False for here in present)
        found = run(values, plan, route, present=present)
        assert [combined.present for combined in found] == [wanted] * 3


@pytest.mark.parametrize("route", ["two_phase", *SPARSE])
def test_other_names_or_steps_are_refused_on_every_rank(route: Route) -> None:
    with pytest.raises(
        RuntimeError, match=r"with each other: replica 0 of step 0, 1 values: a; replica 1 of step 0, 1"
    ):
        run([{"a": draw(0, 40)}, {"b": draw(1, 40)}], topk(0.2), route)
    with pytest.raises(RuntimeError, match=r"replica 0 of step 4, 1 values: a; replica 1 of step 5, 1 values: a"):
        run([{"a": draw(0, 40)}, {"a": draw(1, 40)}], topk(0.2), route, steps=[4, 5])


def test_one_message_takes_what_is_gathered_with_the_second_phase_of_the_rest() -> None:
    plan = by_layer({"*.0.*": quantize(bits=8), "*.1.*": error_feedback(powersgd(1, min_rate=1.0))}, default=topk(0.1))
    values = [named(rank, [61, 400, 97]) for rank in range(2)]
    meters = [Meter() for _ in range(2)]
    first, second = run(values, plan, "auto", meters=meters)
    assert list(first.values) == list(values[0]) and all(
        torch.equal(first.values[fqn], second.values[fqn]) for fqn in first.values
    )
    counts = {op: count.messages for (_, _, op), count in meters[0].by.items()}
    assert counts == {"AllToAll": 2, "AllGather": 2}  # those of PowerSGD's two rounds


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_auto_takes_the_cheaper_way_for_what_is_sparse_and_two_phases_for_the_rest() -> None:
    for other in (None, quantize(bits=4), randk(0.01), projection(), compeft(), cast("bf16"), powersgd(4)):
        assert {route_of(as_compression(other), world) for world in (1, 2, 4, 64)} == {"two_phase"}
    for density in (0.0001, 0.001, 0.01, 0.1, 0.5, 1.0):
        plan = as_compression(topk(density))
        for world in (1, 2, 3, 4, 5, 8, 16, 64):
            ways = {way: route_bytes(way, [1 << 20], topk(density), world) for way in SPARSE}
            assert ways[route_of(plan, world)] <= min(ways.values()) / TWO_PAY + 2 * world  # but for votes
    assert route_of(as_compression(topk(0.01)), 4) == "all_gather"
    assert route_of(as_compression(topk(0.5)), 4) == "sparse_all_reduce"
    for route in ROUTES[1:]:
        assert route_of(as_compression(topk(0.01)), 4, route) == route


def test_where_fp32_is_smaller_an_owner_sends_fp32_and_loses_nothing() -> None:
    dense = of_the_mean(error_feedback(topk(0.5)), 4, "sparse_all_reduce")
    assert dense == error_feedback(cast("fp32"))
    assert of_the_mean(error_feedback(topk(0.01)), 2, "sparse_all_reduce") == error_feedback(topk(0.01).union(2))
    assert of_the_mean(error_feedback(topk(0.01)), 64, "sparse_all_reduce") == error_feedback(topk(0.01).union(UNION))
    assert of_the_mean(error_feedback(topk(0.01)), 64, "two_phase") == error_feedback(topk(0.01))


def test_what_was_chosen_is_said_with_the_bytes_of_every_way() -> None:
    attached = Replicas(every_step(compress=error_feedback(topk(0.1))), 4).attached[0]
    (told,) = attached.decisions
    assert told.startswith("of 3 sparse parameters between 4 replicas go 3 by ")
    assert "per exchange and replica (all of them by two_phase 0.1 kB, all_gather 0.1 kB, sparse_all_reduce" in told
    assert Replicas(every_step(compress=error_feedback(topk(0.1))), 1).attached[0].decisions == []
    assert Replicas(every_step(compress=quantize(bits=8)), 2).attached[0].decisions == []
    assert described({"w": plain(quantize(bits=8))}, {"w": 9}, 4, "auto") is None
    forced = described({"w": plain(topk(0.01))}, {"w": 1_000_000}, 4, "two_phase")
    assert forced is not None and "go 1 by two_phase: 76.1 kB per exchange" in forced and "dense 6,000.0 kB)" in forced


def test_a_choice_that_changes_in_the_run_is_said_again() -> None:
    replicas = Replicas(every_step(compress=after(3, error_feedback(topk(0.001)), before=error_feedback(topk(0.9)))), 4)
    replicas.train(5)
    ways = [told.partition(" go ")[2].partition(":")[0] for told in replicas.attached[1].decisions]
    assert ways == ["3 by sparse_all_reduce", "3 by all_gather"]


SYNCS: dict[str, Any] = {
    "every_step": lambda route: every_step(compress=error_feedback(topk(0.2)), route=route),
    "dgc": lambda route: dgc(0.1, warmup_steps=5, momentum=0.5, route=route),
    "diloco": lambda route: diloco(every_steps=3, compress=ef21(topk(0.2), eta=1), route=route),
}


@pytest.mark.slow
@pytest.mark.parametrize("route", ["all_gather", "auto"])
@pytest.mark.parametrize("name", SYNCS)
def test_replicas_stay_equal_and_learn(name: str, route: Route) -> None:
    """Every sync by both sparse routes: among five, auto is the sparse all-reduce."""
    steps, lr = {"every_step": (60, 0.05), "dgc": (80, 0.05), "diloco": (240, 0.02)}[name]
    replicas = Replicas(SYNCS[name](route), 5, gradient=quadratic, lr=lr)
    replicas.train(steps)
    way = "sparse_all_reduce" if route == "auto" else route
    assert all(f"go 3 by {way}" in told for told in replicas.attached[0].decisions)
    assert all(equal(replicas.live(rank), replicas.live(0)) for rank in range(5))
    shares = torch.tensor([1 + 0.3 * rank for rank in range(5)]) / 8
    for fqn, value in replicas.live(0).items():
        optimum = sum(share * draw(rank, value.numel()) for rank, share in enumerate(shares))
        assert float((value - optimum).norm()) < 0.3 * float(optimum.norm()) + 0.1, fqn


def test_the_compression_of_a_mean_has_the_same_feedback() -> None:
    plan = Compression(topk(0.01), ef21(topk(0.01)).feedback)
    assert of_the_mean(plan, 16, "auto").feedback is plan.feedback
