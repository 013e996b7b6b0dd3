"""One rank of a replica that trains among members, which come and go.

``python -m tests.programs.member JSON`` is one of them as a job of its own; `on_hosts` runs four. Tests run `main` in
processes of this machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain import Members, attach, diloco, streaming_diloco
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize, topk
from dtrain.rounds import lengths
from dtrain.train.data.text import ByteText
from tests.programs.hosts import PATIENCE_SECONDS, submit
from tests.programs.progress import at, note, wait_for, write_whole
from tests.programs.tasks import network, squared_error, stacked, text_batch, transformer

MODULE = "tests.programs.member"
SYNCS: dict[str, Callable[[int], Sync]] = {
    "diloco": lambda every: diloco(every_steps=every),
    "diloco, offloaded": lambda every: diloco(every_steps=every, outer_state="offloaded"),
    "diloco, 8 bits": lambda every: diloco(every_steps=every, compress=quantize(bits=8)),
    "diloco, 4 bits": lambda every: diloco(every_steps=every, compress=error_feedback(quantize(bits=4, block=16))),
    "diloco, lengths": lambda every: diloco(every_steps=lengths([every, every + 3, every - 1])),
    "diloco, everything gathered": lambda every: diloco(
        every_steps=every, compress=error_feedback(topk(1.0)), route="all_gather"
    ),
    "diloco, top-k": lambda every: diloco(every_steps=every, compress=error_feedback(topk(0.1))),
    "streaming": lambda every: streaming_diloco(
        every_steps=every, layers_per_fragment=1, overlap_steps=2, compress=error_feedback(quantize(bits=4, block=16))
    ),
    "streaming, 2 bits, coded": lambda every: streaming_diloco(
        every_steps=every,
        layers_per_fragment=1,
        overlap_steps=2,
        lossless=1,
        compress=error_feedback(quantize("least_squares", bits=2, block=16)),
    ),
}
"""By rounds of so many steps."""
LR, TEXT_LR = 0.05, 2e-3
BLOCK, BATCH, EVALUATED = 128, 8, 256


@dataclass(frozen=True)
class Asked:
    """``address``: of the store. ``out``: a folder that all replicas see; ``name``: of this one's files in it.

    ``transformer``: dim, layers and heads of one that learns text; without it a small network learns a sine.
    ``strike``: what it does to itself at step ``strike_at``: "die" or "freeze". ``hold_at``: there it waits until
    ``hold_for`` replicas have come in all. ``after``: it begins when there is this file. ``pause``: seconds that each
    step takes longer.
    """

    address: str
    out: str
    name: str
    sync: str = "diloco"
    every_steps: int = 5
    steps: int = 40
    replicas: int = 3
    shards: int = 1
    rank: int = 0
    transformer: tuple[int, int, int] | tuple[()] = ()
    seed: int = 0
    strike: str = ""
    strike_at: int = -1
    hold_at: int = -1
    hold_for: int = 0
    after: str = ""
    pause: float = 0.0
    patience: float = 3.0
    timeout: float = 90.0
    grace: float = math.inf
    secret: str | None = None
    run: str = "dtrain"


@dataclass(frozen=True)
class Member:
    """A replica that has joined."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    members: Members
    sync: Attached


@dataclass(frozen=True)
class Trained:
    """One replica's story. ``rows``: after each of its steps, that step, how many members there were, and its slot.

    ``loss``: on held-out text, else that of the last step. ``parameters``: of the small network, at the end.
    """

    first_step: int
    loss: float
    rows: list[tuple[int, int, int]]
    digest: str
    parameters: list[list[float]]

    @property
    def sizes(self) -> list[int]:
        """How many members there were, by its own steps."""
        return [size for _, size, _ in self.rows]


def built(asked: Asked) -> nn.Module:
    """The first weights."""
    if asked.transformer:
        return transformer(*asked.transformer, block=BLOCK, seed=asked.seed)
    return network(16, 16)


def joined(asked: Asked) -> Member:
    """The default process group of this replica, its model, and its place among the others."""
    if asked.shards == 1:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    else:
        meeting = f"file://{asked.out}/{asked.name}.store"
        dist.init_process_group("gloo", init_method=meeting, rank=asked.rank, world_size=asked.shards)
    torch.set_num_threads(1)
    model = built(asked)
    if asked.shards == 1:
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (asked.shards,)))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if asked.transformer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=TEXT_LR)
    members = Members(
        asked.address, replicas=asked.replicas, patience_seconds=asked.patience, timeout_seconds=asked.timeout,
        grace_seconds=asked.grace, run=asked.run, secret_file=asked.secret,
    )  # fmt: skip
    sync = attach(model, optimizer, SYNCS[asked.sync](asked.every_steps), members=members)
    return Member(model, optimizer, members, sync)


def _nothing(member: Member) -> None:
    pass


def main(
    asked: Asked, begun: Callable[[Member], None] = _nothing, stepped: Callable[[Member], None] = _nothing
) -> None:
    """Train. ``begun`` is called when it has joined, ``stepped`` after each step."""
    out = Path(asked.out)
    wait_for(lambda: not asked.after or (out / asked.after).exists())
    member = joined(asked)
    begun(member)
    model, sync, members = member.model, member.sync, member.members
    text = ByteText(block=BLOCK) if asked.transformer else None
    first_step, rows, loss = sync.steps, [], torch.tensor(math.nan)
    while sync.steps < asked.steps:
        step = sync.steps
        note(out, asked.name, step)
        if step == asked.hold_at:
            (out / f"holds-{asked.name}").touch()
            wait_for(lambda: members.arrivals >= asked.hold_for, PATIENCE_SECONDS)
        loss = _loss(member, asked, text)
        loss.backward()
        if asked.strike and step == asked.strike_at:
            (out / f"{asked.strike}-{asked.name}").touch()
            os.kill(os.getpid(), signal.SIGKILL if asked.strike == "die" else signal.SIGSTOP)
        time.sleep(asked.pause)
        sync.step()
        rows.append((sync.steps, members.place.size, members.slot))
        stepped(member)
    sync.close_round()
    with sync.evaluation():
        last = float(loss.detach()) if text is None else _validation(model)
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        values = [parameter.detach().flatten() for parameter in whole]
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()
    if asked.rank == 0:
        parameters = [value.tolist() for value in values] if text is None else []
        trained = Trained(first_step, last, rows, digest, parameters)
        write_whole(out / f"{asked.name}.json", json.dumps(dataclasses.asdict(trained)))
    sync.detach()
    dist.destroy_process_group()


def _loss(member: Member, asked: Asked, text: ByteText | None) -> Tensor:
    """Of the batch that is its slot's at its step."""
    step, slot = member.sync.steps, member.members.slot
    if text is None:
        return squared_error(member.model, step, slot)
    loss: Tensor = member.model(text_batch(text, asked.seed, (step * asked.replicas + slot) * BATCH, BATCH))
    return loss


def _validation(model: nn.Module) -> float:
    held_out = ByteText(block=BLOCK, split="validation")
    spread = [held_out[number * len(held_out) // EVALUATED] for number in range(EVALUATED)]
    with torch.no_grad():
        return statistics.mean(float(model(stacked(spread[start : start + 32]))) for start in range(0, EVALUATED, 32))


def read(folder: Path, name: str) -> Trained:
    """What a replica has written at its end."""
    content = json.loads((folder / f"{name}.json").read_text())
    return Trained(**{**content, "rows": [tuple(row) for row in content["rows"]]})


# ---- on the hosts of a cluster --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A run: what its replicas found in the end. ``killed_at``, ``begun_at``: steps, or None where nobody was."""

    seed: int
    replicas: dict[str, Trained]
    killed_at: int | None = None
    begun_at: int | None = None


def on_hosts(asked: Asked, kill_at: int | None = None, begin_at: int | None = None) -> Whole:
    """Run replicas on the cluster that is up; one is killed when it is at a step, and a newcomer is begun when the
    others are at another.
    """
    folder = Path(asked.out)
    folder.mkdir(parents=True)
    names = [f"replica{number}" for number in range(asked.replicas)]
    for name in names:
        submit(MODULE, dataclasses.replace(asked, name=name))
    if kill_at is not None and begin_at is not None:
        dies = names.pop(1)
        wait_for(lambda: at(folder, dies)[1] >= kill_at, PATIENCE_SECONDS)
        os.kill(at(folder, dies)[0], signal.SIGKILL)
        wait_for(lambda: at(folder, names[0])[1] >= begin_at, PATIENCE_SECONDS)
        names.append("newcomer")
        submit(MODULE, dataclasses.replace(asked, name="newcomer"))
    wait_for(lambda: all((folder / f"{name}.json").exists() for name in names), PATIENCE_SECONDS)
    return Whole(asked.seed, {name: read(folder, name) for name in names}, kill_at, begin_at)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Asked(**{**given, "transformer": tuple(given["transformer"])}))
