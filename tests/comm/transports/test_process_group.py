"""Tensors that a group does not serve are copied to where it does, and the reply back."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Shift
from dtrain.comm.transports.process_group import TorchTransport, near, served

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("backends", "types"),
    [
        ({GPU: "gloo", CPU: "gloo"}, ["cpu"]), ({GPU: "nccl"}, ["cuda"]), ({GPU: "nccl", CPU: "gloo"}, ["cpu", "cuda"]),
    ],
    ids=["gloo", "nccl", "both"],
)  # fmt: skip
def test_what_a_group_serves(backends: dict[torch.device, str], types: list[str]) -> None:
    group: Any = SimpleNamespace(
        _device_types=list(backends), _get_backend=lambda device: SimpleNamespace(name=lambda: backends[device])
    )
    assert served(cast(dist.ProcessGroup, group)) == types


def test_where_a_message_is_sent_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert near(CPU, ["cuda"]) == torch.device("cuda", 3)
    assert near(GPU, ["cuda"]) == near(GPU, ["cpu", "cuda"]) == GPU
    assert near(GPU, ["cpu"]) == near(CPU, ["cpu"]) == near(CPU, ["cpu", "cuda"]) == CPU


@pytest.fixture
def transport() -> Iterator[TorchTransport]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield TorchTransport(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "make", [AllGather, AllToAll, AllReduce, lambda t: Broadcast(t, source=0), lambda t: Shift(t, 0, 0)]
)
def test_a_reply_goes_home(transport: TorchTransport, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    homes: list[torch.device] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, *places: Any, **settings: Any) -> torch.Tensor:
        homes.extend(place for place in places if isinstance(place, torch.device))
        return to(tensor, *places, **settings)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    transport.issue(make((torch.ones(1, 3),))).wait()
    assert homes == [CPU, CPU]  # to where it is sent from, and back
