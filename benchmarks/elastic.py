"""Replicas that come and go: four Slurm jobs that train one model, one killed in mid-round, a new one started later."""

from __future__ import annotations

import dataclasses
import itertools
import statistics

from benchmarks.harness import Session, say
from benchmarks.page import Report, at_least, at_most, table
from dtrain.slurm.devcluster import devcluster
from tests.programs.hosts import CLUSTER, store
from tests.programs.member import Asked, Whole, on_hosts

REPLICAS = 4
SEEDS = (1, 2, 3)


def asked(address: str, out: str, seed: int) -> Asked:
    """A run of the report."""
    return Asked(
        address, out, "", sync="diloco, 8 bits", every_steps=20, steps=300, replicas=REPLICAS, transformer=(128, 4, 4),
        seed=seed, patience=10.0, timeout=600.0, run=f"seed{seed}-{out.rpartition('/')[2]}",
    )  # fmt: skip


def elastic(session: Session) -> Report:
    """Undisturbed runs and runs that lose a replica and get another, on four hosts, links of 100 Mbit/s."""
    wholes = []
    with devcluster(nodes=REPLICAS, bandwidth="100mbit", name=CLUSTER), store() as address:
        for seed in SEEDS:
            for kill_at, begin_at in ((None, None), (110, 170)):
                folder = session.folder / f"elastic-{next(session.numbers)}"
                say(f"seed {seed}, " + ("undisturbed" if kill_at is None else "one killed, another begun"))
                wholes.append(on_hosts(asked(address, str(folder), seed), kill_at, begin_at))
    return elastic_report(wholes, asked("", "", 0))


def elastic_report(wholes: list[Whole], asked: Asked) -> Report:
    """Undisturbed and disturbed runs, of the same seeds."""
    rows = []
    for whole in wholes:
        loss = next(iter(whole.replicas.values())).loss
        first = next((one.first_step for name, one in whole.replicas.items() if name == "newcomer"), None)
        said = "undisturbed" if first is None else (
            f"one killed at step {whole.killed_at}, another begun at {whole.begun_at}, which trained from {first} on"
        )  # fmt: skip
        sizes = next(iter(whole.replicas.values())).sizes
        changes = [str(sizes[0]), *(str(b) for a, b in itertools.pairwise(sizes) if a != b)]
        rows.append([str(whole.seed), said, " → ".join(changes), f"{loss:.4f}"])
    calm = [next(iter(w.replicas.values())).loss for w in wholes if w.killed_at is None]
    upset = [next(iter(w.replicas.values())).loss for w in wholes if w.killed_at is not None]
    alike = sum(len({one.digest for one in whole.replicas.values()}) == 1 for whole in wholes)
    noise = 2 * statistics.stdev(calm)
    checks = (
        at_least("runs whose replicas ended with equal parameters", alike, len(wholes)),
        at_least("runs that ended with four replicas", sum(row[2].endswith("4") for row in rows), len(wholes)),
        at_most("mean loss of disturbed runs, off that of undisturbed ones", abs(statistics.mean(upset)
                - statistics.mean(calm)), round(noise, 4)),
    )  # fmt: skip
    body = (
        f"{asked.steps} steps of DiLoCo in rounds of {asked.every_steps} with 8 bits, the default text, a transformer "
        f"of 1 million parameters. Each of {REPLICAS} replicas is a Slurm job of its own on a host of `dtrain cluster` "
        "with a link of 100 Mbit/s; they meet at a store on the login host (`dtrain members`). In half of the runs one "
        "is killed with SIGKILL in the middle of a round, and another is submitted later. Validation loss in nats per "
        "byte.\n\n"
        + table(["seed", "run", "members", "loss"], rows)
        + "\n\nThe last line is twice the standard deviation of the undisturbed runs, which differ by their seeds."
    )
    figures: dict[str, object] = {"wholes": [dataclasses.asdict(whole) for whole in wholes]}
    return Report("Replicas that come and go", body, ("python -m benchmarks elastic",), checks, figures)
