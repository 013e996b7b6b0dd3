"""One byte a machine and step, on four hosts: equal to the bit, replayed from the log, joined, and left.

``python -m benchmarks.one_byte JSON`` is one machine, under any launcher. With a store it is a job of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from benchmarks.elastic import at, submit, wait_for
from benchmarks.elastic import store as served
from benchmarks.harness import Session, say
from benchmarks.launches import NAME, on_hosts
from benchmarks.page import Report, at_least, at_most, table
from dtrain import Members, attach, one_byte
from dtrain.bench import wire
from dtrain.comm.methods.one_byte import AttachedOneByte
from dtrain.comm.runtime.membership.joining import AttachedElasticOneByte
from dtrain.comm.shared_seed.replay import replay
from dtrain.comm.shared_seed.update_log import Record, read
from dtrain.comm.transports.json_gather import told_by_all
from dtrain.report.figures import in_bytes
from dtrain.slurm.devcluster import devcluster
from dtrain.train.data.order import example_at
from dtrain.train.data.text import ByteText
from dtrain.train.models.transformer import Transformer

MACHINES, BLOCK, BATCH = 4, 64, 4
RATE, LATENCY = "10mbit", "10ms"


@dataclass(frozen=True)
class Asked:
    """``out``: what it found; its folder holds the logs. ``store``: of a run whose machines come and go.

    ``weights``: what it starts from, else the first ones. Steps: ``kill_at``: one machine is killed there; ``save_at``:
    there weights are saved, from which a newcomer starts; ``begin_at``: it begins; who ``holds`` waits there for it.
    """

    out: str
    store: str = ""
    name: str = ""
    steps: int = 500
    model: tuple[int, int, int] = (128, 2, 4)
    weights: str = ""
    kill_at: int = 120
    save_at: int = 180
    begin_at: int = 230
    holds: bool = False


@dataclass(frozen=True)
class Machine:
    """What one machine did: its log's name, losses by step, from which step on, and how it came there.

    ``payload``: bytes that went to others as bytes of directions; ``sent``: by its interface.
    """

    log: str
    began: int
    came_by: str
    losses: list[float]
    digest: int
    payload: int
    sent: int
    seconds: float


def built(asked: Asked) -> Transformer:
    """The first weights."""
    torch.manual_seed(0)
    dim, layers, heads = asked.model
    return Transformer(dim=dim, layers=layers, heads=heads, vocab_size=256, max_length=BLOCK)


def main(asked: Asked) -> None:
    """Train one machine among the others."""
    folder = Path(asked.out).parent if not asked.store else Path(asked.out)
    if asked.store:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = built(asked)
    if asked.weights:
        model.load_state_dict(torch.load(asked.weights))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    members = Members(asked.store, replicas=MACHINES, patience_seconds=10, run=folder.name) if asked.store else None
    sync = attach(model, optimizer, one_byte(log=str(folder / "log"), verify_every=0), seed=1, members=members)
    assert isinstance(sync, AttachedOneByte)
    began, before, started = sync.steps, wire.sent(), time.perf_counter()
    losses = _trained(sync, model, asked, members)
    seconds = time.perf_counter() - started
    moved = wire.busiest(before, wire.sent())[1]
    number = members.id if members is not None else dist.get_rank()
    log = f"{'machine' if members is not None else 'replica'}-{number}.log"
    came_by = sync.came_by if isinstance(sync, AttachedElasticOneByte) else ""
    found = Machine(log, began, came_by, losses, sync.digest(), sync.meter.sent_as("bytes"), moved, seconds)
    sync.detach()
    if asked.store:
        (folder / f"{asked.name}.json").write_text(json.dumps(dataclasses.asdict(found)))
    else:
        everybody = told_by_all(dataclasses.asdict(found))
        if dist.get_rank() == 0:
            Path(asked.out).write_text(json.dumps(everybody))
        dist.barrier()
    dist.destroy_process_group()


def _trained(sync: AttachedOneByte, model: Transformer, asked: Asked, members: Members | None) -> list[float]:
    text, losses = ByteText(block=BLOCK), []
    while sync.steps < asked.steps:
        if members is not None:
            (Path(asked.out) / f"{asked.name}.progress").write_text(f"{os.getpid()} {sync.steps}")
            if sync.steps == asked.save_at and members.slot == 0:
                torch.save(model.state_dict(), Path(asked.out) / "snapshot.pt")
            if asked.holds and sync.steps == asked.begin_at:
                wait_for(lambda: members.arrivals > MACHINES)
        mine = members.id if members is not None else dist.get_rank()
        examples = [text[example_at(1, (sync.steps * 16 + mine) * BATCH + n, len(text))] for n in range(BATCH)]
        batch: Mapping[str, Tensor] = {name: torch.stack([each[name] for each in examples]) for name in examples[0]}
        losses.append(sync.estimate(lambda: model(batch)))  # noqa: B023, called at once
        sync.step()
    return losses


# ---- runs of it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Machines by name, the records of their logs, and the digest that a replay from the first weights ends with."""

    machines: dict[str, Machine]
    records: dict[str, list[Record]]
    replayed: int


def one_byte_on_hosts(session: Session) -> Report:
    """Four machines that stay, and four of which one is killed and another comes."""
    with devcluster(nodes=MACHINES, bandwidth=RATE, latency=LATENCY, name=NAME):
        out = on_hosts(session, MACHINES, "benchmarks.one_byte", lambda path: dataclasses.asdict(Asked(path)))
        stayed = _read(
            Asked(""), out.parent, {f"machine {n}": each for n, each in enumerate(json.loads(out.read_text()))}
        )
        with served() as address:
            folder = session.folder / f"one-byte-{next(session.numbers)}"
            say("one killed, another begun")
            went = come_and_go(Asked(str(folder), address))
    return one_byte_report(stayed, went, Asked(""))


def come_and_go(asked: Asked) -> Run:
    """Machines that are jobs; one is killed, and later another begins with weights that were saved meanwhile."""
    folder = Path(asked.out)
    folder.mkdir(parents=True)
    names = [f"machine{number}" for number in range(MACHINES)]
    for name in names:
        submit(dataclasses.replace(asked, name=name, holds=True), "benchmarks.one_byte")
    dies = names.pop()
    wait_for(lambda: at(folder, dies)[1] >= asked.kill_at)
    os.kill(at(folder, dies)[0], signal.SIGKILL)
    wait_for(lambda: at(folder, names[0])[1] >= asked.begin_at)
    snapshot = str(folder / "snapshot.pt")
    submit(dataclasses.replace(asked, name="newcomer", weights=snapshot), "benchmarks.one_byte")
    names.append("newcomer")
    wait_for(lambda: all((folder / f"{name}.json").exists() for name in names))
    return _read(asked, folder, {name: json.loads((folder / f"{name}.json").read_text()) for name in names})


def _read(asked: Asked, folder: Path, found: Mapping[str, Mapping[str, object]]) -> Run:
    machines = {name: Machine(**each) for name, each in found.items()}  # type: ignore[arg-type]
    logs = {name: read(folder / "log" / each.log) for name, each in machines.items()}
    first = {fqn: p.detach() for fqn, p in built(asked).named_parameters()}
    whole = next(log for log in logs.values() if log.records[0].step.number == 0)
    torch.set_num_threads(1)  # beside other processes a second thread is waited for longer than it helps
    replay(whole, first)  # which compares the digest after each step with the log's
    return Run(machines, {name: log.records for name, log in logs.items()}, whole.records[-1].digest)


def one_byte_report(stayed: Run, went: Run, asked: Asked) -> Report:
    """Of machines that stayed, and of those that came and went."""
    checks = []
    for said, run in (("that stay", stayed), ("that come and go", went)):
        longest = max(run.records.values(), key=len)
        by_step = {record.step.number: record for record in longest}
        same = sum(record == by_step.get(record.step.number) for records in run.records.values() for record in records)
        total = sum(len(records) for records in run.records.values())
        checks.append(
            at_least(f"records, digests included, that are the same everywhere, of machines {said}", same, total)
        )
        alike = sum(machine.digest == run.replayed for machine in run.machines.values())
        checks.append(at_least(f"machines {said} that ended with the replay's weights", alike, len(run.machines)))
    exact = {each.payload / (asked.steps * (MACHINES - 1)) for each in stayed.machines.values()}
    checks.append(at_least("payload for each other machine, sample and step, least", min(exact), 1.0, " B"))
    checks.append(at_most("payload for each other machine, sample and step, most", max(exact), 1.0, " B"))
    newcomer = went.machines["newcomer"]
    rows = [[
        name, str(each.began), each.came_by or "-", f"{each.losses[0]:.3f}", f"{_last(each.losses):.3f}",
        f"{each.payload:,} B", in_bytes(each.sent),
    ] for name, each in (*stayed.machines.items(), *went.machines.items())]  # fmt: skip
    crowds = [len(record.step.workers) for record in max(went.records.values(), key=len)]
    changes = [
        str(crowds[0]),
        *(f"{b} from step {n + 1}" for n, (a, b) in enumerate(itertools.pairwise(crowds)) if a != b),
    ]
    a_step = next(iter(stayed.machines.values()))
    body = (
        f"{asked.steps} steps, one direction each, of a transformer of 0.4 million parameters on {MACHINES} hosts of "
        f"`dtrain cluster`, links of {RATE} and {LATENCY}. First four machines that stay; then four, each a Slurm job "
        f"of its own, of which one is killed with SIGKILL at step {asked.kill_at}, and another submitted at step "
        f"{asked.begin_at} with the weights of step {asked.save_at}: {', '.join(changes)} machines. Loss: mean of both "
        "ways, of the first step "
        "and of the last 50.\n\n"
        + table(["machine", "from step", "came by", "loss", "in the end", "payload", "interface"], rows)
        + f"\n\nWhat the interface counts above the payload is headers and acknowledgements: "
        f"{a_step.sent / asked.steps:.0f} bytes a step for {MACHINES - 1} of payload. The newcomer took "
        f"{'the tail of the log' if newcomer.came_by == 'log' else 'the weights of a member'}, as measured to be the "
        "faster way, and its first step was the next one of the others."
    )
    figures = {
        said: {name: dataclasses.asdict(each) for name, each in run.machines.items()}
        for said, run in (("stayed", stayed), ("went", went))
    }
    return Report("One byte a machine and step", body, ("python -m benchmarks one_byte",), tuple(checks), figures)


def _last(losses: list[float]) -> float:
    return sum(losses[-50:]) / len(losses[-50:])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Asked(**{**given, "model": tuple(given["model"])}))
