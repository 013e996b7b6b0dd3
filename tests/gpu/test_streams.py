"""The channel's side stream with slow kernels ahead of what it reads and of what reads its results.

A wait that is missing gives wrong numbers here: the values that a flow is given are computed some milliseconds after
it was started, and memory that is reused too early is overwritten at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.comm.channel import Channel, Handle
from dtrain.comm.ops import AllGather, Flow
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.comm.transports.transport import SelfTransport
from dtrain.compress import error_feedback, quantize
from dtrain.train.process_group import joined
from tests.gpu.card import DEVICE
from tests.gpu.jobs import slow

NUMEL = 1 << 20


@pytest.fixture(params=["alone", "group"])
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    """Over nothing, and over a group of one rank: NCCL's on a card."""
    if request.param == "alone":
        opened = Channel({"replicate": SelfTransport(), "shard": SelfTransport()})
        yield opened
        opened.close()
        return
    with joined():
        opened = Channel({"replicate": TorchTransport.between([0]), "shard": SelfTransport()})
        assert opened.transports["replicate"].in_stream_order == (DEVICE == "cuda")
        yield opened
        opened.close()


def doubled(value: Tensor) -> Flow[Tensor]:
    (rows,) = yield AllGather((value * 1.0,))
    slow(5)
    return rows[0] * 2.0


def test_a_flow_waits_for_slow_values_and_its_reader_for_a_slow_flow(channel: Channel) -> None:
    for number in range(20):
        slow(10)
        value = torch.full((NUMEL,), float(number), device=DEVICE)
        result = channel.run(doubled(value), "x")
        assert bool((result == 2.0 * number).all())


def test_memory_is_not_given_away_while_another_stream_uses_it(channel: Channel) -> None:
    handles: list[Handle[Tensor]] = []
    for number in range(20):
        slow(2)
        value = torch.full((NUMEL,), float(number), device=DEVICE)
        handles.append(channel.start(doubled(value), "x"))
        del value
        channel.flush()
        torch.full((NUMEL,), -1.0, device=DEVICE)  # the next who asks for memory of this size, and writes
    totals = []
    for handle in handles:
        result = handle.wait()
        slow(2)  # the result is read after the flows that follow have asked for memory
        totals.append(result.sum(dtype=torch.float64))
        del result
    assert [float(total) for total in totals] == [2.0 * number * NUMEL for number in range(20)]


def test_compute_goes_on_beside_a_flow(channel: Channel) -> None:
    """Both take 50 ms of one multiprocessor; one after the other they would take 100."""
    if DEVICE == "cpu":
        pytest.skip("a processor has no streams")

    def waiting() -> Flow[None]:
        yield AllGather((torch.ones(1, device=DEVICE),))
        slow(50)

    def seconds(flows: int, kernels: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        handles = [channel.start(waiting(), "x") for _ in range(flows)]
        for _ in range(kernels):
            slow(50)
        for handle in handles:
            handle.wait()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(1, 1)
    flow, kernel, both = (min(seconds(*which) for _ in range(3)) for which in ((1, 0), (0, 1), (1, 1)))
    assert both < 0.75 * (flow + kernel), f"{flow=:.3f} s, {kernel=:.3f} s, {both=:.3f} s together"


class Slow(nn.Module):
    """A layer in whose backward pass the card is busy before it has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if x.requires_grad:
                x.register_hook(_busy)
        return x.square().mean()


def _busy(gradient: Tensor) -> None:
    slow(3)


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_gradients_of_a_slow_backward_pass_are_those_of_a_patient_one(name: str) -> None:
    """One rank: what DDP's hook exchanges comes back as it was sent, whenever it was computed."""
    compress = None if name == "fp32" else error_feedback(quantize(bits=8))
    found = []
    with joined():
        for patient in (True, False):
            torch.manual_seed(0)
            model = DistributedDataParallel(Slow().to(DEVICE), bucket_cap_mb=0.2, gradient_as_bucket_view=True)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            sync = dtrain.attach(model, optimizer, dtrain.every_step(compress=compress))
            for step in range(6):
                x = torch.randn(16, 256, generator=torch.Generator().manual_seed(step)).to(DEVICE)
                loss = model(x)
                if patient and DEVICE == "cuda":
                    torch.cuda.synchronize()
                loss.backward()
                if patient and DEVICE == "cuda":
                    torch.cuda.synchronize()
                assert sync.step()
            sync.detach()
            found.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
