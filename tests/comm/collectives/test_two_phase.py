"""Routes: one mean for everybody, whatever the compressor, the split into messages, and the number of ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.aggregators.mean import mean, rank_order_mean
from dtrain.comm.collectives.all_reduce import native_mean
from dtrain.comm.collectives.routes import Route
from dtrain.comm.collectives.two_phase import Combined, all_finite, two_phase, two_phase_bytes
from dtrain.comm.compressors.cast import Cast, cast
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.compressors.quantize import quantize
from dtrain.comm.feedback import Compression, error_feedback
from dtrain.comm.ops import Flow, Payload, Place
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from tests.comm.zoo import (
    COMPRESSORS,
    DETERMINISTIC,
    bits,
    compressors,
    exchange,
    fresh_states,
    kinds_of_values,
    named,
    numels,
    per_rank,
    plain,
    routes,
    seeds,
    worlds,
)

FP32 = plain(cast("fp32"))


def means(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {fqn: rank_order_mean(torch.stack([mine[fqn] for mine in values])) for fqn in values[0]}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(bits(one[fqn]), bits(other[fqn])) for fqn in one)


def natively(values: list[dict[str, Tensor]], compressor: Compressor) -> list[Combined]:
    plan = plain(compressor)
    return simulate([native_mean(mine, plan, Key(0, 0, rank), State({})) for rank, mine in enumerate(values)])


# --- the mean -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 50), seeds)
def test_the_rank_order_mean_adds_from_rank_0_to_the_last(world: int, numel: int, seed: int) -> None:
    rows = torch.randn(world, numel, generator=torch.Generator().manual_seed(seed))
    untouched = rows.clone()
    total = torch.zeros(numel)
    for row in rows:
        total = total + row
    assert torch.equal(rank_order_mean(rows), total / world)
    assert torch.equal(rank_order_mean(rows.t().contiguous().t()), total / world)  # whatever the strides
    assert torch.equal(rows, untouched)
    assert mean() is rank_order_mean


# --- two phases -----------------------------------------------------------------------------------------------------


@given(worlds, numels, kinds_of_values, seeds, routes)
@settings(max_examples=40)
def test_uncompressed_it_is_the_rank_order_mean_to_the_bit(
    world: int, sizes: list[int], kind: str, seed: int, route: Route
) -> None:
    values = per_rank(seed, sizes, world, kind)
    wanted = means(values)
    for combined in exchange(values, FP32, route=route):
        assert combined.finite
        assert all(torch.equal(combined.values[fqn], wanted[fqn]) for fqn in wanted)
        assert all(combined.values[fqn].shape == value.shape for fqn, value in values[0].items())


@given(worlds, numels, compressors, kinds_of_values, seeds, routes, st.data())
@settings(max_examples=40)
def test_the_split_into_messages_changes_no_bit(
    world: int, sizes: list[int], compressor: Compressor, kind: str, seed: int, route: Route, data: st.DataObject
) -> None:
    """Bucket independence: one message, one for each name, or anything between, in any order of the names."""
    compression = error_feedback(compressor) if compressor.delta > 0 and data.draw(st.booleans()) else plain(compressor)
    values = per_rank(seed, sizes, world, kind)
    together, states = exchange(values, compression, whole := fresh_states(compression, world), route=route), whole
    names = data.draw(st.permutations(list(values[0])))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(names)), max_size=3)))
    buckets = [names[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    split = fresh_states(compression, world)
    apart: list[dict[str, Tensor]] = [{} for _ in range(world)]
    for bucket in buckets:  # an empty message too
        parts = exchange([{fqn: mine[fqn] for fqn in bucket} for mine in values], compression, split, route=route)
        for rank, part in enumerate(parts):
            apart[rank].update(part.values)
    for rank in range(world):
        assert equal({fqn: apart[rank][fqn] for fqn in values[0]}, together[rank].values)
        for state in (states[rank], split[rank]):
            state.commit()
        for fqn in values[0]:
            residuals = [state.get(fqn, "residual", values[rank][fqn]) for state in (states[rank], split[rank])]
            assert torch.equal(*residuals)


@given(worlds, numels, compressors, kinds_of_values, seeds, routes)
@settings(max_examples=40)
def test_every_rank_gets_the_same_bits(
    world: int, sizes: list[int], compressor: Compressor, kind: str, seed: int, route: Route
) -> None:
    first, *others = exchange(per_rank(seed, sizes, world, kind), plain(compressor), seed=seed, route=route)
    for other in others:
        assert equal(first.values, other.values) and other.finite == first.finite


@given(worlds, numels, st.integers(2, 8), st.sampled_from([16, 512]), kinds_of_values, seeds)
@settings(max_examples=40)
def test_a_quantized_mean_errs_by_half_a_unit_in_each_phase(
    world: int, sizes: list[int], bits_of_a_code: int, block: int, kind: str, seed: int
) -> None:
    values = per_rank(seed, sizes, world, kind)
    wanted = means(values)
    combined = exchange(values, plain(quantize(bits=bits_of_a_code, block=block)))[0]
    largest = max((float(v.abs().max()) for mine in values for v in mine.values() if v.numel()), default=0.0)
    unit = 2 * largest / (2**bits_of_a_code - 1)
    for fqn, value in wanted.items():
        # The mean's own range is at most half a unit wider at each end than that of what was sent.
        allowed = 0.5 * unit + 0.5 * (unit + unit / (2**bits_of_a_code - 1)) + 1e-5 * largest
        assert float((combined.values[fqn] - value).abs().max() if value.numel() else 0.0) <= allowed


@pytest.mark.slow
def test_nothing_that_was_given_is_written_to() -> None:
    for compressor, route in itertools.product(COMPRESSORS.values(), DETERMINISTIC):
        values = per_rank(1, [7, 97], 3)
        untouched = [{fqn: value.clone() for fqn, value in mine.items()} for mine in values]
        exchange(values, error_feedback(compressor) if compressor.delta > 0 else plain(compressor), route=route)
        assert all(equal(one, other) for one, other in zip(values, untouched, strict=True))


def test_equal_values_on_all_ranks_draw_differently_on_each() -> None:
    """Ranks whose stochastic rounding shared its noise would not average it away."""
    compressor = quantize(bits=2, block=64, rounding="stochastic")
    values = [named(0, [4000])] * 4
    fqn = next(iter(values[0]))
    chunks: list[Tensor] = []

    def watch(rows: Tensor) -> Tensor:
        chunks.append(rows)
        return rank_order_mean(rows)

    simulate([two_phase(values[r], plain(compressor), watch, Place(r, 4), Key(0, 0, r), State({})) for r in range(4)])
    assert len(chunks) == 4 and fqn
    for rows in chunks:
        assert len({tuple(row.tolist()) for row in rows}) == 4


def test_the_rule_is_the_callers() -> None:
    def largest(rows: Tensor) -> Tensor:
        return rows.amax(0)

    values = per_rank(4, [1, 10, 61], 3)
    for r, combined in enumerate(
        simulate([two_phase(values[r], FP32, largest, Place(r, 3), Key(0, 0, r), State({})) for r in range(3)])
    ):
        for fqn in values[r]:
            assert torch.equal(combined.values[fqn], torch.stack([mine[fqn] for mine in values]).amax(0))


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_on_one_rank_is_bad_for_all(compressor: Compressor, world: int, bad: float) -> None:
    for (numel, place), route in itertools.product([(1, 0), (7, 6), (61, 0), (61, 33)], DETERMINISTIC):
        values = per_rank(2, [3, numel], world)
        list(values[world - 1].values())[1][place] = bad
        found = exchange(values, plain(compressor), route=route)
        assert [combined.finite for combined in found] == [False] * world


def test_a_bad_value_is_bad_for_all_under_a_rule_that_ignores_it_too() -> None:
    def forgiving(rows: Tensor) -> Tensor:
        return rows.nan_to_num(0.0, 0.0, 0.0).amin(0)

    values = per_rank(2, [61], 3)
    values[1]["layers.0.weight"][33] = math.nan
    flows = [two_phase(values[r], FP32, forgiving, Place(r, 3), Key(0, 0, r), State({})) for r in range(3)]
    for combined in simulate(flows):
        assert all_finite(combined.values) and not combined.finite


@dataclass(frozen=True)
class Spy(Cast):
    """The identity, which remembers with which keys it was asked to encode."""

    seen: list[Key] = field(default_factory=list, compare=False)

    def encode(self, rows: Tensor, key: Key) -> Payload:
        self.seen.append(key)
        return super().encode(rows, key)


def test_every_draw_has_a_key_of_its_own() -> None:
    """Of each step, rank, name and phase: shared noise would not average out."""
    spy = Spy("fp32")
    for step in range(2):
        exchange(per_rank(1, [7, 7, 5], 3), plain(spy), step=step, seed=9)
    assert len(spy.seen) == len(set(spy.seen)) == 2 * 3 * 3 * 2
    assert {key.seed for key in spy.seen} == {9} and {key.rank for key in spy.seen} == {0, 1, 2}


# --- the native route -----------------------------------------------------------------------------------------------


@given(worlds, numels, kinds_of_values, seeds, st.sampled_from(["fp32", "bf16", "fp16"]))
@settings(max_examples=40)
def test_the_native_mean_is_close_to_the_rank_order_mean(
    world: int, sizes: list[int], kind: str, seed: int, name: str
) -> None:
    values = per_rank(seed, sizes, world, "normal" if name == "fp16" else kind)
    wanted = means(values)
    tolerance = {"fp32": 1e-6, "bf16": 2.0**-7, "fp16": 2.0**-10}[name] * (world + 1)
    first, *others = natively(values, COMPRESSORS[name])
    assert first.finite
    for fqn, value in wanted.items():
        size = torch.stack([mine[fqn].abs() for mine in values]).amax(0)
        assert bool(((first.values[fqn] - value).abs() <= tolerance * size + 1e-6).all())
        assert first.values[fqn].dtype == torch.float32
    assert all(equal(first.values, other.values) for other in others)


def test_the_native_mean_sees_what_is_not_finite() -> None:
    for bad in (math.nan, math.inf, 3e38):
        values = per_rank(1, [5, 7], 3)
        for mine in values if bad == 3e38 else values[1:2]:
            mine["layers.1.weight"][2] = bad
        assert [combined.finite for combined in natively(values, cast("fp32"))] == [False] * 3
    assert natively(per_rank(1, [5], 2), cast("fp16"))[0].finite
    too_large = [
        {"w": torch.full((3,), 40000.0)} for _ in range(2)
    ]  # the sum overflows fp16, though the mean would fit
    assert not natively(too_large, cast("fp16"))[0].finite


# --- bytes and helpers ----------------------------------------------------------------------------------------------


@given(st.integers(1, 9), numels, compressors)
def test_bytes_do_not_grow_with_the_number_of_ranks(world: int, sizes: list[int], compressor: Compressor) -> None:
    sent = two_phase_bytes(sizes, compressor, world)
    rows = sum(compressor.row_bytes(-(-numel // world)) for numel in sizes)
    assert sent == 2 * (world - 1) * (rows + 1)
    if compressor == cast("fp32"):
        exact = 2 * (world - 1) * 4 * sum(sizes) / world
        assert exact <= sent <= exact + 2 * world * (4 * len(sizes) + 1)


def test_all_finite() -> None:
    assert all_finite({}) and all_finite({"w": torch.zeros(0)}) and all_finite({"w": torch.ones(3)})
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite({"v": torch.zeros(2), "w": torch.tensor([0.0, bad])})


def test_the_routes_work_on_nothing() -> None:
    """A rank of a small sharded model may hold no piece at all, and its peers then hold none either."""
    assert [combined.values for combined in exchange([{}, {}], FP32)] == [{}, {}]
    assert all(combined.finite for combined in natively([{}, {}], cast("fp32")))


@pytest.mark.slow
def test_stochastic_two_phase_is_unbiased() -> None:
    compression = Compression(quantize(bits=3, block=16, rounding="stochastic"), plain(cast("fp32")).feedback)
    values = per_rank(5, [31], 2)
    wanted = means(values)["layers.0.weight"]
    results = torch.stack([exchange(values, compression, step=s)[0].values["layers.0.weight"] for s in range(400)])
    error = (results - wanted).double()
    z = error.mean(0) / error.std(0).clamp(min=1e-9) * 400**0.5
    assert float(z[error.std(0) > 1e-4].abs().max()) < 5


def test_a_flow_is_made_of_two_ops_whatever_it_carries() -> None:
    def count(flow: Flow[Combined]) -> list[str]:
        seen, reply = [], None
        try:
            while True:
                op = flow.send(reply)  # type: ignore[arg-type]
                seen.append(type(op).__name__)
                reply = op.payload if seen[-1] == "AllToAll" else tuple(t.unsqueeze(0) for t in op.payload)
        except StopIteration:
            return seen

    flow = two_phase(named(1, [5, 0, 7]), FP32, rank_order_mean, Place(0, 1), Key(0, 0, 0), State({}))
    assert count(flow) == ["AllToAll", "AllGather"]
