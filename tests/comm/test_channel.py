"""Channel: real transport computes what simulate computes, in one order on all ranks, and failures reach the caller."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from dtrain.comm.channel import Channel, Handle
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Flow, Op, Payload, Place, Shift
from dtrain.comm.transports.meter import Count, Meter
from dtrain.comm.transports.simulate import simulate
from dtrain.comm.transports.transport import SelfTransport, pack, unpack
from dtrain.testing import WorkerPool
from tests.comm.transports.flows import LAYOUTS, ROUNDS, Layout, chained, ops_for, payload
from tests.comm.zoo import DTYPES, SHAPES, bits, once, same, seeds

R = TypeVar("R")
layouts = st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def channel(group: dist.ProcessGroup) -> Iterator[Channel]:
    opened = Channel({"replicate": group, "shard": group})
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


def within(seconds: float, function: Callable[[], R]) -> R:
    """What ``function`` returns or raises; a failure of the test, not of the whole run, where it would block."""
    outcome: list[R] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"still blocked after {seconds} s")
    if errors:
        raise errors[0]
    return outcome[0]


# --- packing ----------------------------------------------------------------------------------------------------


@given(layouts, seeds)
@settings(max_examples=60)
def test_unpack_undoes_pack_at_any_byte_alignment(layout: Layout, seed: int) -> None:
    sent = payload(seed, layout)
    packed = pack(sent, rows=1)
    assert packed.dtype == torch.uint8 and packed.shape == (1, sum(t.numel() * t.element_size() for t in sent))
    assert same(unpack(packed, sent, leading=()), sent)
    three = unpack(torch.cat([packed] * 3), sent, leading=(3,))
    for row in range(3):
        assert same(tuple(tensor[row] for tensor in three), sent)


@given(layouts, seeds, st.integers(1, 5))
@settings(max_examples=60)
def test_rows_of_a_packed_payload_are_the_rows_of_its_tensors(layout: Layout, seed: int, rows: int) -> None:
    sent = payload(seed, [((rows, *shape), dtype) for shape, dtype in layout])
    packed = pack(sent, rows=rows)
    for row in range(rows):
        assert torch.equal(packed[row], torch.cat([bits(tensor[row]) for tensor in sent]))
    assert same(unpack(packed, sent, leading=()), sent)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_column_of_a_matrix_can_be_sent(rows: int) -> None:
    """A slice of at most one element counts as contiguous, whatever its stride is."""
    column = torch.arange(6.0).view(3, 2)[:rows, 1]
    assert same(unpack(pack((column,), rows=1), (column,), leading=()), (column.clone(),))


# --- one rank ----------------------------------------------------------------------------------------------------


@given(layout=layouts, seed=seeds)
@settings(max_examples=15)
def test_with_one_rank_every_op_is_what_simulate_says(group: dist.ProcessGroup, layout: Layout, seed: int) -> None:
    opened = Channel({"replicate": group})
    for op in ops_for(0, 1, seed, layout):
        assert same(within(20, lambda op=op: opened.run(once(op), "x")), simulate([once(op)])[0])  # type: ignore[misc]
    opened.close()


def test_replies_are_nobody_elses_memory(channel: Channel) -> None:
    for make in (AllReduce, AllGather, AllToAll, Broadcast):
        sent = torch.ones(1, 4)
        (reply,) = channel.run(once(make((sent,))), "x")
        reply.fill_(5.0)
        assert torch.equal(sent, torch.ones(1, 4)), make
    (reply,) = channel.run(once(Shift((sent,), destination=0, source=0)), "x")
    reply.fill_(5.0)
    assert torch.equal(sent, torch.ones(1, 4))


@pytest.mark.parametrize(
    "op", [AllReduce(()), AllGather(()), AllToAll(()), Broadcast(())], ids=lambda op: type(op).__name__
)
def test_a_payload_of_no_tensors(channel: Channel, op: Op) -> None:
    """What a rank has to send whose shard of a small model is empty; `simulate` takes it."""
    assert within(20, lambda: channel.run(once(op), "x")) == simulate([once(op)])[0] == ()


def test_the_channel_knows_its_places_and_counts_what_it_sends(channel: Channel) -> None:
    assert channel.places == {"replicate": Place(0, 1), "shard": Place(0, 1)}

    def both() -> Flow[None]:
        yield AllGather((torch.zeros(3),))
        yield AllGather((torch.zeros(3),), axis="shard")

    channel.run(both(), "traffic")
    assert channel.meter.by == {
        ("replicate", "traffic", "AllGather"): Count(0, 1),
        ("shard", "traffic", "AllGather"): Count(0, 1),
    }


def logged(name: int, rounds: int, log: list[tuple[int, int]]) -> Flow[tuple[int, int]]:
    total = 0
    for round_number in range(rounds):
        log.append((name, round_number))
        (reply,) = yield AllReduce((torch.tensor([name + round_number]),))
        total += int(reply)
    return name, total


@given(batches=st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=3), data=st.data())
@settings(max_examples=25)
def test_ops_go_out_by_waves_the_youngest_flow_first(
    group: dist.ProcessGroup, batches: list[list[int]], data: st.DataObject
) -> None:
    """Op r of flow b belongs to wave b + r, counted from the last flush: however slow a rank is to start its flows."""
    opened = Channel({"replicate": group})
    log: list[tuple[int, int]] = []
    wanted: list[tuple[int, int]] = []
    handles: list[tuple[int, int, Handle[tuple[int, int]]]] = []
    for batch in batches:
        first = len(handles)
        for rounds in batch:
            handles.append((len(handles), rounds, opened.start(logged(len(handles), rounds, log), "x")))
            if data.draw(st.booleans()):
                time.sleep(0.001)
        opened.flush()
        ops = [(first + b, r) for b, rounds in enumerate(batch) for r in range(rounds)]
        wanted += sorted(ops, key=lambda op: (op[0] + op[1], -op[0]))
    for name, rounds, handle in data.draw(st.permutations(handles)):
        total = name * rounds + sum(range(rounds))
        assert within(20, handle.wait) == (name, total)
    opened.close()
    assert log == wanted


def test_start_does_not_block_and_wait_counts_as_exposed(channel: Channel) -> None:
    gate = threading.Event()

    def slow() -> Flow[int]:
        (reply,) = yield AllGather((torch.tensor([5]),))
        assert gate.wait(20)
        return int(reply)

    handle = channel.start(slow(), "slow")
    channel.flush()
    time.sleep(0.02)
    assert channel.meter.exposed_seconds == 0.0 and handle.ended_at == 0.0
    threading.Timer(0.05, gate.set).start()
    started = time.perf_counter()
    assert handle.wait() == 5
    assert 0.02 < channel.meter.exposed_seconds <= time.perf_counter() - started
    assert started < handle.ended_at <= time.perf_counter()
    exposed = channel.meter.exposed_seconds
    assert handle.wait() == handle.result() == 5  # again, at no cost
    assert channel.meter.exposed_seconds == pytest.approx(exposed, abs=0.05)


def test_flows_run_on_the_worker_thread_and_so_does_what_follows_them(channel: Channel) -> None:
    seen: list[str] = []

    def where() -> Flow[str]:
        yield AllGather((torch.zeros(1),))
        return threading.current_thread().name

    handle = channel.start(where(), "x", then=lambda done: seen.append(threading.current_thread().name + done.wait()))
    channel.flush()
    assert within(20, handle.wait) == "dtrain-channel"
    channel.close()
    assert seen == ["dtrain-channel" * 2]


def test_the_worker_thread_is_on_the_gpu_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread begins on GPU 0; a stream there would order nothing that this rank computes on another."""
    devices: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.append((threading.current_thread().name, device))
    )
    channel = Channel({"replicate": SelfTransport(), "shard": SelfTransport()})
    assert channel.run(logged(0, 2, []), "x") is not None
    channel.close()
    assert devices == [("dtrain-channel", 3)]


def broken(at: int) -> Flow[None]:
    for _ in range(at):
        yield AllGather((torch.zeros(1),))
    raise ZeroDivisionError("the third gradient")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_in_a_flow_reaches_wait_and_ends_what_comes_later(channel: Channel, at: int) -> None:
    good = channel.start(logged(3, 1, []), "x")
    channel.flush()
    bad, beside, late = (channel.start(flow, "x") for flow in (broken(at), logged(1, 3, []), logged(1, 2, [])))
    with pytest.raises(RuntimeError, match="a collective flow failed: the third gradient") as caught:
        within(20, bad.wait)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert within(20, good.wait) == (3, 3)
    for handle in (beside, late, channel.start(logged(0, 1, []), "x")):
        with pytest.raises(RuntimeError, match="an earlier flow on this channel failed: the third gradient"):
            within(20, handle.wait)
    within(20, channel.close)


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(AllReduce((torch.zeros(1),), axis="shard"), id="an axis without a group"),
        pytest.param(Broadcast((torch.zeros(1),), source=7), id="a rank that is not there"),
    ],
)
def test_an_op_that_cannot_be_sent_fails_its_flow(group: dist.ProcessGroup, op: Op) -> None:
    opened = Channel({"replicate": group})
    with pytest.raises(RuntimeError, match="a collective flow failed"):
        within(20, lambda: opened.run(once(op), "x"))
    within(20, opened.close)


def test_an_error_in_what_follows_a_flow_does_not_hang_later_flows(channel: Channel) -> None:
    def then(done: Handle[tuple[int, int]]) -> None:
        raise ZeroDivisionError("in then")

    first = channel.start(logged(0, 1, []), "x", then=then)
    channel.flush()
    later = channel.start(logged(1, 1, []), "x")
    for handle in (first, later):  # whether they succeed or say why not, they come to an end
        with contextlib.suppress(RuntimeError):
            within(3, handle.wait)


def test_close_finishes_what_was_started_and_may_be_called_twice(group: dist.ProcessGroup) -> None:
    opened = Channel({"replicate": group})
    handles = [opened.start(logged(name, 2, []), "x") for name in range(3)]
    opened.close()
    assert [handle.result() for handle in handles] == [(name, 2 * name + 1) for name in range(3)]
    within(20, opened.close)


def test_a_flow_on_a_closed_channel_is_an_error_and_not_a_wait_for_ever(group: dist.ProcessGroup) -> None:
    opened = Channel({"replicate": group})
    opened.close()
    with pytest.raises(RuntimeError, match="closed"):
        within(3, lambda: opened.run(logged(0, 1, []), "x"))


def test_two_channels_share_a_meter_if_asked(group: dist.ProcessGroup) -> None:
    meter = Meter()
    for label in ("one", "two"):
        opened = Channel({"replicate": group}, meter)
        opened.run(logged(0, 1, []), label)
        opened.close()
    assert [key[1] for key in meter.by] == ["one", "two"]


# --- two ranks ----------------------------------------------------------------------------------------------------


def open_channel() -> Channel:
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    return Channel({"replicate": group})


def every_op() -> tuple[list[list[Payload]], dict[str, Count]]:
    channel = open_channel()
    rank, world = dist.get_rank(), dist.get_world_size()
    replies = [
        [channel.run(once(op), type(op).__name__) for op in ops_for(rank, world, 17 * number, layout)]
        for number, layout in enumerate(LAYOUTS)
    ]
    channel.close()
    return replies, {label: count for (_, label, _), count in channel.meter.by.items()}


@pytest.mark.processes
def test_two_processes_compute_bit_for_bit_what_simulate_computes(pair: WorkerPool) -> None:
    real = pair.run(every_op)
    for number, layout in enumerate(LAYOUTS):
        ops = [ops_for(rank, 2, 17 * number, layout) for rank in range(2)]
        for index, both in enumerate(zip(*ops, strict=True)):
            for rank, reply in enumerate(simulate([once(op) for op in both])):
                assert same(real[rank][0][number][index], reply), (layout, both[rank])
    # No message for nothing, and yet every op is counted; only the source pays for a broadcast.
    first, second = (counts for _, counts in real)
    assert first["AllGather"] == second["AllGather"]
    assert first["AllGather"].messages == len(LAYOUTS)
    assert first["Broadcast"] == second["Broadcast"]  # each was the source once


def overlapping(order: Sequence[int], flush_after: Sequence[int], slow_rank: int) -> list[Tensor]:
    channel, rank = open_channel(), dist.get_rank()
    handles = []
    for name, rounds in enumerate(ROUNDS):
        if rank == slow_rank:
            time.sleep(0.01)
        handles.append(channel.start(chained(name, rounds, rank), "x"))
        if name in flush_after:
            channel.flush()
    results = {name: handles[name].wait() for name in order}
    channel.close()
    return [results[name] for name in range(len(ROUNDS))]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("order", "flush_after"),
    [(range(7), ()), ([6, 0, 3, 1, 5, 2, 4], ()), ([2, 1, 0, 6, 5, 4, 3], (2, 4))],
    ids=["as started", "another order", "flushed twice"],
)
@pytest.mark.parametrize("slow_rank", [-1, 0, 1])
def test_flows_under_way_together_keep_to_themselves(
    pair: WorkerPool, order: Sequence[int], flush_after: Sequence[int], slow_rank: int
) -> None:
    real = pair.run(overlapping, list(order), list(flush_after), slow_rank, seconds=40)
    for name, rounds in enumerate(ROUNDS):
        expected = simulate([chained(name, rounds, rank) for rank in range(2)])
        for rank in range(2):
            assert torch.equal(real[rank][name], expected[rank])


def failing(at: int) -> list[str]:
    channel = open_channel()
    good = channel.start(logged(3, 1, []), "x")
    channel.flush()
    bad, beside = channel.start(broken(at), "x"), channel.start(logged(0, 3, []), "x")
    messages = []
    for wait in (good.wait, bad.wait, beside.wait, lambda: channel.run(logged(0, 1, []), "x")):
        try:
            messages.append(str(wait()))
        except RuntimeError as error:
            messages.append(str(error))
    channel.close()
    return messages


@pytest.mark.processes
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_on_all_ranks_ends_all_later_flows_on_all_ranks(pair: WorkerPool, at: int) -> None:
    for good, bad, beside, late in pair.run(failing, at, seconds=40):
        assert good == "(3, 6)"
        assert bad == "a collective flow failed: the third gradient"
        for message in (beside, late):
            assert "an earlier flow on this channel failed: the third gradient" in message
