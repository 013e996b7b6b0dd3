"""The meter counts what the formulas say, whichever driver performs the flow."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.all_reduce import native_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.collectives.routes import Route, route_bytes, route_of
from dtrain.comm.collectives.two_phase import two_phase, two_phase_bytes
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.feedback import error_feedback
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Axis, Broadcast, Flow, Op, Place, Shift, sent_bytes
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.meter import Count, Meter, metered
from dtrain.comm.transports.simulate import simulate
from tests.comm.zoo import COMPRESSORS, compressors, named, numels, plain, routes, worlds


def places(rank: int, world: int) -> dict[Axis, Place]:
    return {"replicate": Place(rank, world), "shard": Place(0, 1)}


@given(worlds, st.integers(0, 50), st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))
def test_bytes_of_each_op(world: int, numel: int, dtype: torch.dtype) -> None:
    row = torch.zeros(numel, dtype=dtype)
    rows = row.expand(world, numel)
    size = numel * dtype.itemsize
    for rank in range(world):

        def sent(op: Op, rank: int = rank) -> int:
            return sent_bytes(op, rank=rank, world=world)

        assert sent(AllToAll((rows,))) == (world - 1) * size  # all rows but its own
        assert sent(AllGather((row,))) == (world - 1) * size
        assert sent(AllReduce((row,))) == 2 * (world - 1) * size // world
        assert sent(AllReduce((row,), "mean")) == sent(AllReduce((row,), "sum"))
        assert sent(Broadcast((row,), source=world - 1)) == ((world - 1) * size if rank == world - 1 else 0)
        assert sent(Shift((row,), destination=(rank + 1) % world, source=(rank - 1) % world)) == (
            size if world > 1 else 0
        )


@given(worlds, st.integers(0, 9))
def test_metered_flows_return_the_same_and_count_each_op(world: int, numel: int) -> None:
    def flow(rank: int) -> Flow[list[float]]:
        mine = torch.full((numel,), float(rank))
        (total,) = yield AllReduce((mine,))
        (rows,) = yield AllGather((total,))
        (rows,) = yield AllGather((rows[0],))
        (first,) = yield Broadcast((mine,), source=world - 1)
        return [*rows.flatten().tolist(), *first.tolist()]

    meters = [Meter() for _ in range(world)]
    counted = simulate([metered(flow(r), meters[r], places(r, world), "x") for r in range(world)])
    assert counted == simulate([flow(rank) for rank in range(world)])
    size = 4 * numel
    for rank, meter in enumerate(meters):
        assert meter.by == {
            ("replicate", "x", "AllReduce"): Count(2 * (world - 1) * size // world, 1),
            ("replicate", "x", "AllGather"): Count(2 * (world - 1) * size, 2),
            ("replicate", "x", "Broadcast"): Count((world - 1) * size if rank == world - 1 else 0, 1),
        }
        assert meter.sent_bytes == sum(count.bytes for count in meter.by.values())


@given(worlds, numels, compressors, st.booleans())
@settings(max_examples=60)
def test_a_two_phase_message_sends_what_its_formula_says(
    world: int, sizes: list[int], compressor: Compressor, feedback: bool
) -> None:
    compression = error_feedback(compressor) if feedback and compressor.delta > 0 else plain(compressor)
    meters = [Meter() for _ in range(world)]
    flows = [
        metered(
            two_phase(
                named(rank, sizes),
                compression,
                rank_order_mean,
                Place(rank, world),
                Key(0, 0, rank),
                State(compression.feedback.kinds),
            ),
            meters[rank],
            places(rank, world),
            "gradients",
        )
        for rank in range(world)
    ]
    simulate(flows)
    for meter in meters:
        assert meter.sent_bytes == two_phase_bytes(sizes, compressor, world)
        assert sum(count.messages for count in meter.by.values()) == 2


@given(worlds, numels, compressors, routes, st.booleans(), st.booleans())
@settings(max_examples=60)
def test_an_exchange_sends_what_the_formula_of_its_route_says(
    world: int, sizes: list[int], compressor: Compressor, route: Route, feedback: bool, weighted: bool
) -> None:
    compression = error_feedback(compressor) if feedback and compressor.delta > 0 else plain(compressor)
    meters, weight = [Meter() for _ in range(world)], 2.0 if weighted else None
    flows = [
        metered(
            exchange(
                named(rank, sizes), compression, rank_order_mean, Place(rank, world), Key(0, 0, rank),
                State(compression.feedback.kinds), route=route, weight=weight,
            ),
            meters[rank], places(rank, world), "gradients",
        )
        for rank in range(world)
    ]  # fmt: skip
    simulate(flows)
    taken = route_of(compression, world, route)
    for meter in meters:
        assert meter.sent_bytes == route_bytes(route, sizes, compressor, world, weighted=weighted)
        assert sum(count.messages for count in meter.by.values()) == (1 if taken == "all_gather" else 2)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@given(world=worlds, sizes=numels)
@settings(max_examples=20)
def test_a_native_mean_sends_a_ring(name: str, world: int, sizes: list[int]) -> None:
    meters = [Meter() for _ in range(world)]
    simulate(
        [
            metered(
                native_mean(named(r, sizes), plain(COMPRESSORS[name]), Key(0, 0, r), State({})),
                meters[r],
                places(r, world),
                "g",
            )
            for r in range(world)
        ]
    )
    payload = sum(COMPRESSORS[name].row_bytes(numel) for numel in sizes)
    for meter in meters:
        assert meter.by == {("replicate", "g", "AllReduce"): Count(2 * (world - 1) * payload // world, 1)}


def of(*entries: tuple[Axis, str, int]) -> Meter:
    """A meter that has seen an all-gather of so many floats for each (axis, label, floats), among 3 and 2 ranks."""
    meter = Meter()
    sizes = {"replicate": 3, "shard": 2}
    for axis, label, numel in entries:
        meter.record(AllGather((torch.zeros(numel),), axis=axis), Place(1, sizes[axis]), label)
    return meter


def test_only_the_replicate_axis_is_slow() -> None:
    meter = of(
        ("replicate", "gradients", 10), ("shard", "gradients", 100), ("shard", "agree", 1), ("replicate", "r", 1)
    )
    assert meter.sent_bytes == 2 * 40 + 2 * 4
    assert meter.sent_as("gradients") == 80
    assert meter.sent_as("r") == 8
    assert meter.sent_as("agree") == 0
    assert meter.sent_as("never heard of") == 0
    assert meter.by["shard", "gradients", "AllGather"] == Count(400, 1)


def test_exposed_seconds_are_those_of_labels_that_cross_the_replicate_axis() -> None:
    meter = of(("replicate", "gradients", 10), ("shard", "gradients", 1), ("shard", "agree", 1))
    for seconds, label in [(1.0, "gradients"), (0.5, "gradients"), (32.0, "agree"), (64.0, "nothing sent yet")]:
        meter.wait(seconds, label)
    assert meter.exposed_seconds == 1.5
    assert meter.waited == {"gradients": 1.5, "agree": 32.0, "nothing sent yet": 64.0}


def test_a_restarted_meter_goes_on_from_the_figures_of_the_earlier_process() -> None:
    meter = of(("replicate", "gradients", 10))
    meter.wait(3.0, "gradients")
    meter.restart(sent_bytes=1000, exposed_seconds=7.0)
    assert (meter.sent_bytes, meter.exposed_seconds, meter.sent_as("gradients")) == (1000, 7.0, 0)
    meter.record(AllGather((torch.zeros(10),)), Place(0, 2), "gradients")
    meter.wait(0.25, "gradients")
    assert (meter.sent_bytes, meter.exposed_seconds, meter.sent_as("gradients")) == (1040, 7.25, 40)
    meter.restart()
    assert (meter.sent_bytes, meter.exposed_seconds) == (0, 0.0)


def test_the_error_of_a_flow_passes_through() -> None:
    def fails() -> Flow[None]:
        yield AllGather((torch.zeros(1),))
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        simulate([metered(fails(), Meter(), places(0, 1), "x")])


def test_threads_may_count_together() -> None:
    meter = Meter()
    op = AllGather((torch.zeros(1),))

    def count() -> None:
        for _ in range(500):
            meter.record(op, Place(0, 2), "x")
            meter.wait(1.0, "x")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.by == {("replicate", "x", "AllGather"): Count(8000, 2000)}
    assert meter.exposed_seconds == 2000.0
