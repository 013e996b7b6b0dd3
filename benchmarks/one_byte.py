"""One byte a machine and step, on four hosts: equal to the bit, replayed from the log, joined, and left."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from benchmarks.harness import Session, say
from benchmarks.launches import on_hosts
from benchmarks.page import Report, at_least, at_most, table
from dtrain.report.figures import in_bytes
from dtrain.slurm.devcluster import devcluster
from tests.programs.hosts import CLUSTER, store
from tests.programs.machine import MODULE, Asked, Run, come_and_go, read

MACHINES, STEPS = 4, 500
KILL_AT, SAVE_AT, BEGIN_AT = 120, 180, 230
RATE, LATENCY = "10mbit", "10ms"


def asked(out: str, address: str = "") -> Asked:
    """A run of the report: of machines that stay, or that come and go."""
    return Asked(
        out, address, steps=STEPS, machines=MACHINES, samples=1, verify_every=0, transformer=(128, 2, 4),
        save_at=SAVE_AT, patience=10.0, timeout=600.0, run=out.rpartition("/")[2],
    )  # fmt: skip


def one_byte_on_hosts(session: Session) -> Report:
    """Four machines that stay, and four of which one is killed and another comes."""
    with devcluster(nodes=MACHINES, bandwidth=RATE, latency=LATENCY, name=CLUSTER):
        out = on_hosts(session, MACHINES, MODULE, lambda path: dataclasses.asdict(asked(str(Path(path).parent))))
        stayed = read(asked(str(out.parent)), [f"machine {number}" for number in range(MACHINES)])
        with store() as address:
            folder = session.folder / f"one-byte-{next(session.numbers)}"
            say("one killed, another begun")
            went = come_and_go(asked(str(folder), address), KILL_AT, BEGIN_AT)
    return one_byte_report(stayed, went)


def one_byte_report(stayed: Run, went: Run) -> Report:
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
    exact = {machine.payload / (STEPS * (MACHINES - 1)) for machine in stayed.machines.values()}
    checks.append(at_least("payload for each other machine, sample and step, least", min(exact), 1.0, " B"))
    checks.append(at_most("payload for each other machine, sample and step, most", max(exact), 1.0, " B"))
    newcomer = went.machines["newcomer"]
    rows = [[
        name, str(machine.began), machine.came_by or "-", f"{machine.losses[0]:.3f}", f"{_last(machine.losses):.3f}",
        f"{machine.payload:,} B", in_bytes(machine.sent),
    ] for name, machine in (*stayed.machines.items(), *went.machines.items())]  # fmt: skip
    crowds = [len(record.step.workers) for record in max(went.records.values(), key=len)]
    changes = [
        str(crowds[0]),
        *(f"{b} from step {n + 1}" for n, (a, b) in enumerate(itertools.pairwise(crowds)) if a != b),
    ]
    a_step = next(iter(stayed.machines.values()))
    body = (
        f"{STEPS} steps, one direction each, of a transformer of 0.4 million parameters on {MACHINES} hosts of "
        f"`dtrain cluster`, links of {RATE} and {LATENCY}. First four machines that stay; then four, each a Slurm job "
        f"of its own, of which one is killed with SIGKILL at step {KILL_AT}, and another submitted at step "
        f"{BEGIN_AT} with the weights of step {SAVE_AT}: {', '.join(changes)} machines. Loss: mean of both "
        "ways, of the first step "
        "and of the last 50.\n\n"
        + table(["machine", "from step", "came by", "loss", "in the end", "payload", "interface"], rows)
        + f"\n\nWhat the interface counts above the payload is headers and acknowledgements: "
        f"{a_step.sent / STEPS:.0f} bytes a step for {MACHINES - 1} of payload. The newcomer took "
        f"{'the tail of the log' if newcomer.came_by == 'log' else 'the weights of a member'}, as measured to be the "
        "faster way, and its first step was the next one of the others."
    )
    figures = {
        said: {name: dataclasses.asdict(machine) for name, machine in run.machines.items()}
        for said, run in (("stayed", stayed), ("went", went))
    }
    return Report("One byte a machine and step", body, ("python -m benchmarks one_byte",), tuple(checks), figures)


def _last(losses: list[float]) -> float:
    return sum(losses[-50:]) / len(losses[-50:])
