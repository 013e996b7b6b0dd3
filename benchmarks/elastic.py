"""Replicas that come and go: four Slurm jobs that train one model, one killed in mid-round, a new one started later.

``python -m benchmarks.elastic JSON`` is one replica, a job of its own under any launcher.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Session, say
from benchmarks.launches import NAME
from benchmarks.page import Report, at_least, at_most, table
from dtrain import Members, attach, diloco
from dtrain.compress import quantize
from dtrain.slurm.devcluster import devcluster, login_command
from dtrain.train.data.order import example_at
from dtrain.train.data.text import ByteText
from dtrain.train.models.transformer import Transformer

REPLICAS, BLOCK, BATCH, EVALUATED = 4, 128, 8, 256
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Asked:
    """``out``: a folder that all replicas see; ``name``: of this one's files in it.

    ``hold_at``: a step at which it waits until a newcomer has come.
    """

    store: str
    out: str
    name: str
    seed: int
    steps: int = 300
    every_steps: int = 20
    model: tuple[int, int, int] = (128, 4, 4)
    hold_at: int = -1


@dataclass(frozen=True)
class Trained:
    """One replica's story. ``sizes``: how many members there were, by its own steps."""

    first_step: int
    loss: float
    sizes: list[int]
    digest: str


@dataclass(frozen=True)
class Whole:
    """A run: what its replicas found in the end. ``killed_at``, ``begun_at``: steps, or None where nobody was."""

    seed: int
    replicas: dict[str, Trained]
    killed_at: int | None = None
    begun_at: int | None = None


def main(asked: Asked) -> None:
    """Train one replica among the others."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    dim, layers, heads = asked.model
    model = DistributedDataParallel(Transformer(dim=dim, layers=layers, heads=heads, vocab_size=256, max_length=BLOCK))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    members = Members(
        asked.store, replicas=REPLICAS, patience_seconds=10, run=f"seed{asked.seed}-{Path(asked.out).name}"
    )
    sync = attach(model, optimizer, diloco(every_steps=asked.every_steps, compress=quantize(bits=8)), members=members)
    text, progress = ByteText(block=BLOCK), Path(asked.out) / f"{asked.name}.progress"
    first_step, sizes = sync.steps, []
    while sync.steps < asked.steps:
        progress.write_text(f"{os.getpid()} {sync.steps}")
        if sync.steps == asked.hold_at:
            wait_for(lambda: members.arrivals > REPLICAS)
        first = (sync.steps * REPLICAS + members.slot) * BATCH
        examples = [text[example_at(asked.seed, first + number, len(text))] for number in range(BATCH)]
        model(_batch(examples)).backward()
        sync.step()
        sizes.append(members.place.size)
    sync.close_round()
    held_out = ByteText(block=BLOCK, split="validation")
    with sync.evaluation(), torch.no_grad():
        spread = [held_out[number * len(held_out) // EVALUATED] for number in range(EVALUATED)]
        parts = [spread[start : start + 32] for start in range(0, EVALUATED, 32)]
        loss = statistics.mean(float(model(_batch(part))) for part in parts)
        digest = float(sum(p.double().sum() for p in model.parameters())).hex()
    found = Trained(first_step, loss, sizes, digest)
    (Path(asked.out) / f"{asked.name}.json").write_text(json.dumps(dataclasses.asdict(found)))
    sync.detach()
    dist.destroy_process_group()


def _batch(examples: list[dict[str, Tensor]]) -> Mapping[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


# ---- runs of it -----------------------------------------------------------------------------------------------------


def elastic(session: Session) -> Report:
    """Undisturbed runs and runs that lose a replica and get another, on four hosts, links of 100 Mbit/s."""
    wholes = []
    with devcluster(nodes=REPLICAS, bandwidth="100mbit", name=NAME), store() as address:
        for seed in SEEDS:
            for kill_at, begin_at in ((None, None), (110, 170)):
                folder = session.folder / f"elastic-{next(session.numbers)}"
                say(f"seed {seed}, " + ("undisturbed" if kill_at is None else "one killed, another begun"))
                wholes.append(trained(Asked(address, str(folder), "", seed), kill_at, begin_at))
    return elastic_report(wholes, Asked("", "", "", 0))


@contextlib.contextmanager
def store(cluster: str = NAME) -> Iterator[str]:
    """``dtrain members`` on the login host."""
    serve = [sys.executable, "-P", "-m", "dtrain", "members", "--port", "29400", "--host", "0.0.0.0"]
    command, variables = login_command(serve, cluster)
    with subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[3].rstrip(";")
        finally:
            process.terminate()


def trained(asked: Asked, kill_at: int | None = None, begin_at: int | None = None) -> Whole:
    """Run four replicas; one is killed when it is at a step, and a fifth begun when the others are at another."""
    folder = Path(asked.out)
    folder.mkdir(parents=True)
    for number in range(REPLICAS):
        submit(dataclasses.replace(asked, name=f"replica{number}"))
    names = [f"replica{number}" for number in range(REPLICAS)]
    if kill_at is not None and begin_at is not None:
        dies = names.pop(1)
        wait_for(lambda: at(folder, dies)[1] >= kill_at)
        os.kill(at(folder, dies)[0], signal.SIGKILL)
        wait_for(lambda: at(folder, names[0])[1] >= begin_at)
        names.append("newcomer")
        submit(dataclasses.replace(asked, name="newcomer"))
    wait_for(lambda: all((folder / f"{name}.json").exists() for name in names))
    return Whole(
        asked.seed, {name: Trained(**json.loads((folder / f"{name}.json").read_text())) for name in names},
        kill_at, begin_at,
    )  # fmt: skip


class Named(Protocol):
    """What a program of one replica is asked: among other things, where what it finds goes, under which name."""

    @property
    def out(self) -> str: ...

    @property
    def name(self) -> str: ...


def submit(asked: Named, module: str = "benchmarks.elastic") -> None:
    """A replica as a Slurm job of one node, which Slurm does not start again. ``asked``: a dataclass."""
    run = Path(asked.out) / f"run-{asked.name}"
    launch = ["launch", "launcher=slurm", "launcher.nodes=1", "launcher.workers=1", "launcher.max_restarts=0"]
    program = [sys.executable, "-m", module, json.dumps(dataclasses.asdict(asked))]  # type: ignore[call-overload]
    subprocess.run(
        [sys.executable, "-m", "dtrain", *launch, f"run.dir={run}", "--", *program],
        env={**os.environ, "DTRAIN_CLUSTER": os.environ.get("DTRAIN_CLUSTER", NAME)}, check=True, capture_output=True,
    )  # fmt: skip


def at(folder: Path, name: str) -> tuple[int, int]:
    """A replica's process and its step."""
    path = folder / f"{name}.progress"
    words = path.read_text().split() if path.exists() else []
    return (int(words[0]), int(words[1])) if len(words) == 2 else (0, -1)


def wait_for(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    """Raises ``TimeoutError``."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("the replicas did not come to where they were waited for; look at their logs")
        time.sleep(0.05)


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


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Asked(**{**given, "model": tuple(given["model"])}))
