"""What a flow reads on its side stream was computed, what it returns is waited for, and memory outlives its readers.

By a fake that keeps account of streams and events; `tests/gpu/test_streams.py` has a card.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dtrain.comm.adapters import ddp
from dtrain.comm.channel import Channel
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.ops import AllGather, Flow
from dtrain.comm.transports.transport import SelfTransport
from tests.fakes.fake_cuda import FakeCuda, FakeStream, OnCard


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def channel(cuda: FakeCuda) -> Iterator[Channel]:
    opened = Channel({"replicate": SelfTransport(), "shard": SelfTransport()})
    yield opened
    opened.close()


def seen(cuda: FakeCuda, begun: list[FakeStream], value: Tensor) -> Flow[Tensor]:
    begun.append(cuda.current_stream())
    (rows,) = yield AllGather((value,))
    return rows


def test_a_flow_begins_when_its_callers_stream_has_computed_what_it_reads(cuda: FakeCuda, channel: Channel) -> None:
    backward, begun = FakeStream(cuda), list[FakeStream]()
    with cuda.stream(backward):  # as in the thread of the autograd engine, or in a hook of FSDP2
        earlier = backward.record_event()
        handle = channel.start(seen(cuda, begun, torch.ones(3)), "x")
        later = backward.record_event()
    handle.wait()
    (side,) = begun
    assert side not in (backward, cuda.default)
    (waited,) = side.waited_for
    assert waited.stream is backward and earlier.number < waited.number < later.number


def test_whoever_asks_for_a_result_waits_for_the_end_of_its_flow(cuda: FakeCuda, channel: Channel) -> None:
    begun: list[FakeStream] = []
    handle = channel.start(seen(cuda, begun, torch.ones(3)), "x")
    handle.wait()
    optimizer = FakeStream(cuda)
    with cuda.stream(optimizer):
        handle.result()
    for stream in (cuda.default, optimizer):
        (event,) = stream.waited_for
        assert event.stream is begun[0] and event.number > begun[0].waited_for[0].number


def returned(value: object) -> Flow[object]:
    yield AllGather((torch.ones(1),))
    return value


def test_the_memory_of_a_result_is_its_readers_too(cuda: FakeCuda, channel: Channel) -> None:
    one, two, three, four = (OnCard.of(torch.ones(2)) for _ in range(4))
    for value in (Combined({"w": one, "v": two}, True), (None, [three], 5), {"inner": {"w": four}}):
        channel.run(returned(value), "x")
    assert [tensor.users for tensor in (one, two, three, four)] == [[cuda.default]] * 4


def test_what_a_flow_was_given_is_there_until_its_result_is_asked_for(cuda: FakeCuda, channel: Channel) -> None:
    """Freed earlier, it would belong to the caller's stream again, which may run ahead of the side stream."""
    given = torch.ones(2)
    kept = weakref.ref(given)
    handle = channel.start(seen(cuda, [], given), "x")
    del given
    channel.flush()
    assert handle._done.wait(20)
    gc.collect()
    assert kept() is not None
    handle.result()
    del handle
    channel.run(seen(cuda, [], torch.ones(1)), "x")  # the worker has let go of the flow before
    gc.collect()
    assert kept() is None


def test_without_a_card_nothing_is_kept() -> None:
    channel = Channel({"replicate": SelfTransport(), "shard": SelfTransport()})
    handle = channel.start(returned(torch.ones(2)), "x")
    assert handle._given is None
    handle.wait()
    channel.close()


def test_the_futures_that_ddp_gets_know_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they refuse a result on a GPU, and the backward pass never ends."""
    told: list[list[torch.device]] = []
    monkeypatch.setattr(torch.futures, "Future", lambda *, devices: told.append(devices))
    for device in ("cpu", "meta"):
        ddp._future(torch.empty(1, device=device))
    assert told == [[], [torch.device("meta")]]
