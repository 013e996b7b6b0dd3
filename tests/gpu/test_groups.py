"""Process groups with tensors on the card: NCCL with one rank and with several on it, gloo with tensors of the card."""

from __future__ import annotations

import pytest
import torch

from dtrain.comm.channel import Channel
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.comm.transports.simulate import simulate
from dtrain.testing import WorkerPool
from dtrain.train.process_group import joined
from tests.comm.transports.flows import LAYOUTS, ops_for
from tests.comm.zoo import once, same
from tests.gpu.card import DEVICE
from tests.gpu.jobs import all_ops, between_ranks, on_card


def test_one_rank_of_nccl_does_every_op() -> None:
    with joined():
        channel = Channel({"replicate": TorchTransport.between([0])})
        for layout in range(len(LAYOUTS)):
            for here in ops_for(0, 1, 7, LAYOUTS[layout]):
                (expected,) = simulate([once(here)])
                moved = type(here)(**{**vars(here), "payload": tuple(t.to(DEVICE) for t in here.payload)})
                for op in (here, moved):  # numbers that were computed on the CPU too
                    reply = channel.run(once(op), "x")
                    assert all(tensor.device.type == op.payload[0].device.type for tensor in reply)
                    assert same(tuple(tensor.cpu() for tensor in reply), expected)
        channel.close()


@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_of_nccl_on_one_card(workers: WorkerPool, world: int, nccl_between_ranks: str) -> None:
    """A finding, not a promise: NCCL lets ranks of other hosts share a card, and these say that they are."""
    if DEVICE == "cpu":
        pytest.skip("NCCL needs a card")
    reason = nccl_between_ranks or (between_ranks(workers, world) if world > 2 else "")
    if reason:
        pytest.fail(
            f"NCCL with {world} ranks on one card, each with an NCCL_HOSTID of its own, does not work: {reason}"
        )


@pytest.mark.parametrize("from_cpu", [False, True], ids=["card", "cpu"])
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
@pytest.mark.parametrize("name", ["gloo", "nccl"])
def test_two_ranks_do_every_op(
    name: str, layout: int, from_cpu: bool, workers: WorkerPool, request: pytest.FixtureRequest
) -> None:
    if name == "nccl" and request.getfixturevalue("backend") != "nccl":
        pytest.skip("several ranks of NCCL on one card do not work here: test_several_ranks_of_nccl_on_one_card")
    real = workers.run(on_card, name, all_ops_of, layout, from_cpu, seconds=120)
    flows = [[once(op) for op in ops_for(rank, 2, 7, LAYOUTS[layout])] for rank in range(2)]
    for number, pair in enumerate(zip(*flows, strict=True)):
        for rank, expected in enumerate(simulate(list(pair))):
            for found, wanted in zip(real[rank][number], expected, strict=True):
                assert found.dtype == wanted.dtype and found.shape == wanted.shape
                torch.testing.assert_close(found, wanted)  # an all-reduce may add up in another order


def all_ops_of(layout: int, from_cpu: bool) -> list[tuple[torch.Tensor, ...]]:
    return all_ops(7, layout, from_cpu=from_cpu)
