"""Replicas that come and go, saved where nothing is under way; killed and started again they take up their slots."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import torch

from tests.kill.harness import Rank
from tests.kill.slow_text import SECONDS
from tests.programs.member import Asked, Member, main, read
from tests.programs.progress import wait_for

REPLICAS, STEPS, EVERY = 2, 60, 6


def member_rank(folder: Path) -> Rank:
    """A replica of one rank; rank 0's process also serves the store."""

    from dtrain.comm.runtime.membership.secret import made_secret

    secret = folder.with_name(f"{folder.name}.secret")
    made_secret(secret)  # before there are several who would make it

    def rank_main(rank: int, attempt: int, port: int) -> int:
        from dtrain.comm.runtime.membership.members import serve

        store = serve(port, secret_file=secret) if rank == 0 else None
        name = f"rank{rank}"
        pause = 4 * float(os.environ.get(SECONDS, "0"))
        asked = Asked(
            f"127.0.0.1:{port}", str(folder), name, sync="diloco, 4 bits", every_steps=EVERY, steps=STEPS,
            replicas=REPLICAS, pause=pause, patience=5.0, secret=str(secret),
        )  # fmt: skip
        main(asked, lambda member: _load(folder, member), lambda member: _save(folder, member))
        if rank == 0:
            (folder / "summary.json").write_text(json.dumps({"parameters_digest": read(folder, name).digest}))
        gone = folder / f"gone-{attempt}"
        if store is None:
            gone.touch()
        else:
            with suppress(TimeoutError):
                wait_for(gone.exists, 60)  # the store goes last
        return 0

    return rank_main


def _file(folder: Path, slot: int, step: int) -> Path:
    return folder / "checkpoints" / f"slot-{slot}-step-{step}.pt"


def _save(folder: Path, member: Member) -> None:
    """At the end of a round of all replicas."""
    sync, slot = member.sync, member.members.slot
    if sync.steps % EVERY or member.members.place.size < REPLICAS:
        return
    path = _file(folder, slot, sync.steps)
    path.parent.mkdir(exist_ok=True)
    state = {
        "model": member.model.state_dict(), "optimizer": member.optimizer.state_dict(), "sync": sync.state_dict(),
    }  # fmt: skip
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    if slot == 0:
        with suppress(OSError):
            (folder / "checkpoints" / "latest").write_text(f"step-{sync.steps}")


def _load(folder: Path, member: Member) -> None:
    """From the newest step that all slots have saved: every rank finds the same, as nobody runs meanwhile."""
    steps = [
        step
        for step in range(EVERY, STEPS + 1, EVERY)
        if all(_file(folder, slot, step).exists() for slot in range(REPLICAS))
    ]
    if steps:
        state = torch.load(_file(folder, member.members.slot, steps[-1]), weights_only=True)
        member.model.load_state_dict(state["model"])
        member.optimizer.load_state_dict(state["optimizer"])
        member.sync.load_state_dict(state["sync"])
