"""Gradients travel while backward still computes, on gloo too: a backward pass that waits for traffic gets it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain import every_step
from dtrain.comm.transports.meter import Meter
from dtrain.testing import WorkerPool
from dtrain.train.engines import EngineOptions, build_engine
from dtrain.train.mesh import build_mesh

pytestmark = pytest.mark.processes


class WaitsForTraffic(torch.autograd.Function):
    """The identity, whose backward returns only when some gradients have crossed the replicate axis."""

    meter: Meter
    waits = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        deadline = time.monotonic() + 20
        while WaitsForTraffic.waits and not WaitsForTraffic.meter.sent_as("gradients"):
            if time.monotonic() > deadline:
                raise RuntimeError("backward was held up, and nothing was sent meanwhile")
            time.sleep(0.001)
        return gradients[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x: Tensor = self.blocks[0](batch["x"])
        x = WaitsForTraffic.apply(x)  # type: ignore[no-untyped-call]
        for block in list(self.blocks)[1:]:
            x = block(x).tanh()
        return x.square().mean()


def held_up_backward(engine_name: str) -> int:
    mesh = build_mesh(2, 2)
    WaitsForTraffic.meter = mesh.channel.meter
    options = EngineOptions(
        precision="fp32",
        activation_checkpointing=False,
        bucket_mib=0.01,
        clip_norm=1.0,
        microbatches=1,
        microbatch_size=4,
    )
    engine = build_engine(
        engine_name, Model(), lambda model: torch.optim.SGD(model.parameters(), lr=0.1), mesh, options
    )
    attached = every_step().bind(engine.pieces, 0)
    for waits in (False, True):  # DDP cuts its buckets in the order of use only after the first backward
        mesh.channel.meter.restart()
        WaitsForTraffic.waits = waits
        engine.forward_backward([{"x": torch.randn(4, 64)}])
        attached.step()
    sent = mesh.channel.meter.sent_as("gradients")
    attached.detach()
    mesh.control.close()
    return sent


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_communication_overlaps_backward(pool: WorkerPool, engine: str) -> None:
    assert all(sent > 0 for sent in pool.run(held_up_backward, engine))
