"""One rank of a replica that trains among members."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain import Members, attach, diloco, streaming_diloco
from dtrain.comm.runtime.attached import Sync
from dtrain.comm.runtime.membership.elastic import AttachedElastic
from dtrain.compress import error_feedback, quantize

SYNCS: dict[str, Callable[[], Sync]] = {
    "diloco": lambda: diloco(every_steps=5),
    "streaming": lambda: streaming_diloco(
        every_steps=6, layers_per_fragment=1, overlap_steps=2, compress=error_feedback(quantize(bits=4, block=16))
    ),
}
LR = 0.05


@dataclass(frozen=True)
class Asked:
    """``strike``: what it does to itself at step ``strike_at``: "die" or "freeze".

    ``hold_at``: there it waits until ``hold_for`` replicas have come in all. ``after``: it begins when there is a file.
    """

    address: str
    out: str
    name: str
    sync: str = "diloco"
    steps: int = 40
    replicas: int = 3
    shards: int = 1
    rank: int = 0
    strike: str = ""
    strike_at: int = -1
    hold_at: int = -1
    hold_for: int = 0
    after: str = ""
    pause: float = 0.0
    grace: float = math.inf


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model: Callable[[Tensor], Tensor], step: int, slot: int) -> Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * step + slot))
    return (model(x).squeeze() - torch.sin(x @ torch.linspace(-1, 1, 8))).square().mean()


def built(shards: int) -> DistributedDataParallel | FSDPModule:
    model = body()
    if shards == 1:
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (shards,)))


def main(asked: Asked) -> None:
    out = Path(asked.out)
    wait_for(lambda: not asked.after or (out / asked.after).exists())
    meeting = f"file://{out}/{asked.name}.store"
    dist.init_process_group("gloo", init_method=meeting, rank=asked.rank, world_size=asked.shards)
    torch.set_num_threads(1)
    model = built(asked.shards)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)  # type: ignore[union-attr]
    members = Members(
        asked.address, replicas=asked.replicas, patience_seconds=3.0, timeout_seconds=90.0, grace_seconds=asked.grace
    )
    attached = attach(model, optimizer, SYNCS[asked.sync](), members=members)  # type: ignore[arg-type]
    assert isinstance(attached, AttachedElastic)
    rows = []
    while attached.steps < asked.steps:
        step = attached.steps
        if step == asked.hold_at:
            (out / f"holds-{asked.name}").touch()
            wait_for(lambda: members.arrivals >= asked.hold_for)
        loss = loss_of(model, step, members.slot)  # type: ignore[arg-type]
        loss.backward()
        if asked.strike and step == asked.strike_at:
            (out / f"{asked.strike}-{asked.name}").touch()
            os.kill(os.getpid(), signal.SIGKILL if asked.strike == "die" else signal.SIGSTOP)
        time.sleep(asked.pause)
        attached.step()
        rows.append([attached.steps, members.place.size, members.slot])
    attached.close_round()
    with attached.evaluation():
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]  # type: ignore[union-attr]
        parameters = [p.detach().flatten().tolist() for p in whole]
    digest = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()
    if asked.rank == 0:
        kept = {"rows": rows, "digest": digest, "parameters": parameters}
        (out / f"{asked.name}.json").write_text(json.dumps(kept))
    attached.detach()
    dist.destroy_process_group()


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.02)
