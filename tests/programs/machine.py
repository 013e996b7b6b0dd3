"""One machine that trains under one_byte, among machines that stay or that come and go.

``python -m tests.programs.machine JSON`` is one of them: without a store a rank under any launcher, with one a job of
its own; `come_and_go` runs four on hosts. Tests run `main` in processes of this machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from dtrain import Members, attach, one_byte
from dtrain.bench import wire
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.membership.elastic_machines import ElasticMachines
from dtrain.comm.shared_seed.replay import replay
from dtrain.comm.shared_seed.update_log import Record
from dtrain.comm.shared_seed.update_log import read as read_log
from dtrain.comm.transports.json_gather import gather_json
from dtrain.train.data.text import ByteText
from tests.programs.hosts import PATIENCE_SECONDS, submit
from tests.programs.progress import at, note, wait_for, write_whole
from tests.programs.tasks import network, squared_error, text_batch, total, transformer

MODULE = "tests.programs.machine"
LR, TEXT_LR = 0.01, 1e-3
BLOCK, BATCH = 64, 4


@dataclass(frozen=True)
class Asked:
    """``out``: a folder for the logs and what is found. ``address``: of the store, where machines come and go.

    ``transformer``: dim, layers and heads of one that learns text; without it a network of ``width`` learns a sum.
    ``weights``: what it starts from, else the first ones. Steps: before ``die_at`` it kills itself; at ``save_at`` the
    machine of slot 0 saves weights; at ``hold_at`` it waits until ``hold_for`` have come in all. ``digests``: note them
    after each step. ``slow_seconds``: what a direction is said to take.
    """

    out: str
    address: str = ""
    name: str = ""
    steps: int = 60
    machines: int = 3
    samples: int = 2
    verify_every: int = 20
    transformer: tuple[int, int, int] | tuple[()] = ()
    width: int = 16
    weights: str = ""
    die_at: int = -1
    save_at: int = -1
    hold_at: int = -1
    hold_for: int = 0
    digests: bool = False
    slow_seconds: float = 0.0
    patience: float = 4.0
    timeout: float = 60.0
    run: str = "dtrain"


@dataclass(frozen=True)
class Machine:
    """What one machine did: its log's name, losses by step, from which step on, and how it came there.

    ``payload``: bytes that went to others as bytes of directions; ``sent``: by its interface. ``digests``: of all
    weights, by step, where they were asked for.
    """

    log: str
    began: int
    came_by: str
    losses: list[float]
    digest: int
    payload: int
    sent: int
    seconds: float
    digests: dict[str, int] = dataclasses.field(default_factory=dict)


def built(asked: Asked) -> nn.Module:
    """The first weights."""
    return transformer(*asked.transformer, block=BLOCK) if asked.transformer else network(asked.width)


def main(asked: Asked) -> None:
    """Train one machine among the others."""
    out = Path(asked.out)
    if asked.address:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = built(asked)
    if asked.weights:
        model.load_state_dict(torch.load(asked.weights))
    if asked.slow_seconds:  # stands in for a machine that makes directions slowly, or in no time
        ElasticMachines._direction_seconds = lambda self: asked.slow_seconds  # type: ignore[method-assign]
    members = None
    if asked.address:
        members = Members(
            asked.address, replicas=asked.machines, patience_seconds=asked.patience, timeout_seconds=asked.timeout,
            run=asked.run,
        )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=TEXT_LR if asked.transformer else LR)
    spec = one_byte(samples=asked.samples, log=asked.out, verify_every=asked.verify_every)
    sync = attach(model, optimizer, spec, seed=5, members=members)
    began, before, started = sync.steps, wire.sent(), time.perf_counter()
    losses, digests = _trained(sync, model, asked, members)
    seconds = time.perf_counter() - started
    moved = wire.busiest(before, wire.sent())[1]
    log = f"machine-{members.id}.log" if members is not None else f"replica-{dist.get_rank()}.log"
    came_by = members.came_by if members is not None else ""
    payload = sync.meter.sent_as("bytes")
    machine = Machine(log, began, came_by, losses, sync.digest(), payload, moved, seconds, digests)
    sync.detach()
    if asked.address:
        torch.save(model.state_dict(), out / f"{asked.name}.pt")
        write_whole(out / f"{asked.name}.json", json.dumps(dataclasses.asdict(machine)))
    else:
        everybody = gather_json(dataclasses.asdict(machine))
        if dist.get_rank() == 0:
            for number, content in enumerate(everybody):
                write_whole(out / f"machine {number}.json", json.dumps(content))
        dist.barrier()
    dist.destroy_process_group()


def _trained(
    sync: Attached, model: nn.Module, asked: Asked, members: Members | None
) -> tuple[list[float], dict[str, int]]:
    """Losses by step, and digests."""
    out, losses, digests = Path(asked.out), [], {}
    text = ByteText(block=BLOCK) if asked.transformer else None
    while sync.steps < asked.steps:
        if sync.steps == asked.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if members is not None:
            note(out, asked.name, sync.steps)
            if sync.steps == asked.save_at and members.slot == 0:
                torch.save(model.state_dict(), out / "snapshot.pt")
            if sync.steps == asked.hold_at:
                wait_for(lambda: members.arrivals >= asked.hold_for, PATIENCE_SECONDS)
        number = members.id if members is not None else dist.get_rank()
        loss = _loss(model, text, sync.steps, number)
        losses.append([sync.estimate(loss) for _ in range(asked.samples)][-1])
        sync.step()
        if asked.digests:
            digests[str(sync.steps)] = sync.digest()
    return losses, digests


def _loss(model: nn.Module, text: ByteText | None, step: int, machine: int) -> Callable[[], Tensor]:
    """Of the batch that a machine has at a step."""
    if text is None:
        return partial(squared_error, model, step, machine, total)
    return partial(model, text_batch(text, 1, (step * 16 + machine) * BATCH, BATCH))


# ---- on the hosts of a cluster --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Machines by name, the records of their logs, and the digest that a replay from the first weights ends with."""

    machines: dict[str, Machine]
    records: dict[str, list[Record]]
    replayed: int


def come_and_go(asked: Asked, kill_at: int, begin_at: int) -> Run:
    """Machines that are jobs; one is killed, and later another begins with weights that were saved meanwhile."""
    folder = Path(asked.out)
    folder.mkdir(parents=True)
    names = [f"machine{number}" for number in range(asked.machines)]
    holds = dataclasses.replace(asked, hold_at=begin_at, hold_for=asked.machines + 1)
    for name in names:
        submit(MODULE, dataclasses.replace(holds, name=name))
    dies = names.pop()
    wait_for(lambda: at(folder, dies)[1] >= kill_at, PATIENCE_SECONDS)
    os.kill(at(folder, dies)[0], signal.SIGKILL)
    wait_for(lambda: at(folder, names[0])[1] >= begin_at, PATIENCE_SECONDS)
    submit(MODULE, dataclasses.replace(asked, name="newcomer", weights=str(folder / "snapshot.pt")))
    names.append("newcomer")
    wait_for(lambda: all((folder / f"{name}.json").exists() for name in names), PATIENCE_SECONDS)
    return read(asked, names)


def read(asked: Asked, names: list[str]) -> Run:
    """What machines have written, replayed."""
    folder = Path(asked.out)
    contents: Mapping[str, Mapping[str, object]] = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in names
    }
    machines = {name: Machine(**content) for name, content in contents.items()}  # type: ignore[arg-type]
    logs = {name: read_log(folder / machine.log) for name, machine in machines.items()}
    first = {fqn: p.detach() for fqn, p in built(asked).named_parameters()}
    whole = next(log for log in logs.values() if log.records[0].step.number == 0)
    torch.set_num_threads(1)  # beside other processes a second thread is waited for longer than it helps
    replay(whole, first)  # which compares the digest after each step with the log's
    return Run(machines, {name: log.records for name, log in logs.items()}, whole.records[-1].digest)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Asked(**{**given, "transformer": tuple(given["transformer"])}))
