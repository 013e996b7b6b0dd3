"""One machine of a run of one_byte that others join."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from dtrain import Members, attach, one_byte
from dtrain.comm.runtime.membership.joining import AttachedElasticOneByte


@dataclass(frozen=True)
class Asked:
    """``die_at``: the step before which it kills itself. ``hold_at``: there it waits until ``hold_for`` have come.

    ``weights``: what it starts from, else the first ones. ``slow_seconds``: what a direction is said to take.
    """

    address: str
    out: str
    name: str
    steps: int = 60
    machines: int = 3
    die_at: int = -1
    hold_at: int = -1
    hold_for: int = 0
    weights: str = ""
    slow_seconds: float = 0.0
    width: int = 16


def built(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))


def loss_of(model: nn.Module, step: int, machine: int) -> Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * step + machine))
    loss: Tensor = (model(x).squeeze() - x.sum(1)).square().mean()
    return loss


def main(asked: Asked) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    model, out = built(asked.width), Path(asked.out)
    if asked.weights:
        model.load_state_dict(torch.load(asked.weights))
    if asked.slow_seconds:  # stands in for a machine that makes directions slowly, or in no time
        AttachedElasticOneByte._direction_seconds = lambda self: asked.slow_seconds  # type: ignore[method-assign]
    members = Members(asked.address, replicas=asked.machines, patience_seconds=4, timeout_seconds=60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sync = attach(model, optimizer, one_byte(samples=2, log=str(out), verify_every=20), seed=5, members=members)
    assert isinstance(sync, AttachedElasticOneByte)
    began, digests = sync.steps, {}
    while sync.steps < asked.steps:
        if sync.steps == asked.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        while sync.steps == asked.hold_at and members.arrivals < asked.hold_for:
            time.sleep(0.05)
        loss = partial(loss_of, model, sync.steps, members.id)
        losses = [sync.estimate(loss) for _ in range(2)]
        sync.step()
        digests[sync.steps] = sync.digest()
        if asked.name == "a" and sync.steps == asked.hold_at:
            torch.save(model.state_dict(), out / "snapshot.pt")
    found = {
        "began": began, "came_by": sync.came_by, "digests": digests, "id": members.id, "loss": losses[-1],
        "sent": sync.meter.sent_as("bytes"),
    }  # fmt: skip
    sync.detach()
    (out / f"{asked.name}.json").write_text(json.dumps(found))
    torch.save(model.state_dict(), out / f"{asked.name}.pt")
    dist.destroy_process_group()
