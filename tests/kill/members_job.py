"""Replicas that come and go, saved where nothing is under way; killed and started again they take up their slots."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from dtrain.comm.runtime.membership.elastic import AttachedElastic
from tests.kill.harness import Rank
from tests.kill.slow_text import SECONDS

REPLICAS, STEPS, EVERY = 2, 60, 6


def member_rank(folder: Path) -> Rank:
    """A replica of one rank; rank 0's process also serves the store."""

    from dtrain.comm.runtime.membership.secret import made_secret

    secret = folder.with_name(f"{folder.name}.secret")
    made_secret(secret)  # before there are several who would make it

    def rank_main(rank: int, attempt: int, port: int) -> int:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        from dtrain import Members, attach, diloco
        from dtrain.comm.runtime.membership.members import serve
        from dtrain.compress import error_feedback, quantize

        store = serve(port, secret_file=secret) if rank == 0 else None
        own = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=own, rank=0, world_size=1)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        method = diloco(every_steps=EVERY, compress=error_feedback(quantize(bits=4, block=16)))
        members = Members(
            f"127.0.0.1:{port}", replicas=REPLICAS, patience_seconds=5.0, timeout_seconds=60.0, secret_file=secret
        )
        sync = attach(model, optimizer, method, members=members)
        assert isinstance(sync, AttachedElastic)
        _load(folder, sync, model, optimizer, members.slot)
        while sync.steps < STEPS:
            time.sleep(4 * float(os.environ.get(SECONDS, "0")))
            numbers = torch.Generator().manual_seed(1000 * sync.steps + members.slot)
            x = torch.randn(16, 8, generator=numbers)
            (model(x).squeeze() - torch.sin(x.sum(1))).square().mean().backward()
            sync.step()
            if sync.steps % EVERY == 0 and members.place.size == REPLICAS:
                _save(folder, sync, model, optimizer, members.slot)
        sync.close_round()
        with sync.evaluation():
            values = [parameter.detach().flatten().tolist() for parameter in model.parameters()]
        if members.slot == 0:
            found = hashlib.sha256(json.dumps(values).encode()).hexdigest()
            (folder / "summary.json").write_text(json.dumps({"parameters_digest": found}))
        sync.detach()
        dist.destroy_process_group()
        if store is not None:
            _wait_for(folder / f"gone-{attempt}")  # the store goes last
        else:
            (folder / f"gone-{attempt}").touch()
        return 0

    return rank_main


def _file(folder: Path, slot: int, step: int) -> Path:
    return folder / "checkpoints" / f"slot-{slot}-step-{step}.pt"


def _save(folder: Path, sync: AttachedElastic, model: nn.Module, optimizer: torch.optim.Optimizer, slot: int) -> None:
    path = _file(folder, slot, sync.steps)
    path.parent.mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sync": sync.state_dict()}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    if slot == 0:
        with suppress(OSError):
            (folder / "checkpoints" / "latest").write_text(f"step-{sync.steps}")


def _load(folder: Path, sync: AttachedElastic, model: nn.Module, optimizer: torch.optim.Optimizer, slot: int) -> None:
    """From the newest step that all slots have saved: every rank finds the same, as nobody runs meanwhile."""
    steps = [
        step
        for step in range(EVERY, STEPS + 1, EVERY)
        if all(_file(folder, other, step).exists() for other in range(REPLICAS))
    ]
    if steps:
        state = torch.load(_file(folder, slot, steps[-1]), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sync.load_state_dict(state["sync"])


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
