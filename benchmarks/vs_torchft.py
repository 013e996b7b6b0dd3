"""DiLoCo of torchft and ours: the same model, data, period and outer step in the same processes, rounds in turn.

``python -m benchmarks.vs_torchft JSON`` on every rank, under any launcher, is what `beside` runs on four hosts of
`dtrain cluster`. torchft is no dependency of dtrain: `make evidence` installs it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness import Session
from benchmarks.launches import on_hosts
from benchmarks.page import Report, at_most, table
from dtrain import attach, diloco
from dtrain.bench import wire
from dtrain.comm.collectives.routes import Route
from dtrain.comm.plans.plan import Compress
from dtrain.comm.transports.json_gather import gather_json
from dtrain.compress import error_feedback, quantize
from dtrain.report.figures import in_bytes, in_time
from dtrain.slurm.devcluster import devcluster
from dtrain.train.data.text import ByteText
from dtrain.train.models.transformer import Transformer
from tests.programs.hosts import CLUSTER

THEIRS, OURS = "torchft", "fp32"
CODECS: dict[str, Compress] = {
    OURS: None,
    "8 bits": quantize(bits=8),
    "4 bits": error_feedback(quantize(bits=4, block=128)),
}
RANKS, BLOCK, BATCH, PATIENCE = 4, 64, 4, timedelta(minutes=5)
COMPARED = 120
"""Steps whose losses are held to each other; what rounding sets apart grows from step to step."""


@dataclass(frozen=True)
class Asked:
    """What to train. ``model``: dim, layers and heads. The first ``warmup`` rounds are not timed."""

    out: str
    every_steps: int = 10
    rounds: int = 30
    warmup: int = 2
    model: tuple[int, int, int] = (256, 4, 4)
    lr: float = 3e-4


@dataclass(frozen=True)
class Trained:
    """Of one library: losses of rank 0 by step, seconds of each timed round, the slowest rank's, and of a round the
    bytes that rank 0's interface sent.
    """

    losses: list[float]
    seconds: list[float]
    sent_bytes: int


class _Training:
    """A model of its own, trained by torchft or by dtrain."""

    def __init__(self, asked: Asked, codec: str, lighthouse: str, stack: ExitStack) -> None:
        torch.manual_seed(0)
        dim, layers, heads = asked.model
        self.model: nn.Module = Transformer(dim=dim, layers=layers, heads=heads, vocab_size=256, max_length=BLOCK)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=asked.lr)
        self.attached = None
        if codec == THEIRS:
            outer = torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)
            stack.enter_context(_theirs(self.model, self.optimizer, outer, asked.every_steps, lighthouse))
        else:
            route: Route = "all_reduce" if codec == OURS else "two_phase"
            sync = diloco(every_steps=asked.every_steps, compress=CODECS[codec], route=route)
            self.attached = attach(self.model, self.optimizer, sync)
        self.losses: list[float] = []

    def round(self, batches: list[Mapping[str, Tensor]]) -> None:
        for batch in batches:
            loss = self.model(batch)
            loss.backward()
            if self.attached is None:
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                self.attached.step()
            self.losses.append(float(loss))


def _theirs(
    model: nn.Module, inner: torch.optim.Optimizer, outer: torch.optim.Optimizer, every_steps: int, lighthouse: str
) -> ExitStack:
    """Torchft's DiLoCo around ``model``, one replica on each rank."""
    from torch._C._distributed_c10d import TCPStore
    from torchft import Manager, ProcessGroupGloo
    from torchft.local_sgd import DiLoCo

    stack = ExitStack()
    store = TCPStore(socket.gethostname(), 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE), load_state_dict=lambda state: None, state_dict=dict,
        min_replica_size=dist.get_world_size(), use_async_quorum=False, timeout=PATIENCE, quorum_timeout=PATIENCE,
        rank=0, world_size=1, store_addr=socket.gethostname(), store_port=store.port, lighthouse_addr=lighthouse,
        replica_id=f"replica_{dist.get_rank()}", init_sync=False,
    )  # fmt: skip
    stack.callback(manager.shutdown, wait=False)
    stack.callback(lambda: store)  # which lives as long
    stack.enter_context(DiLoCo(manager, [model], inner, outer, sync_every=every_steps))
    return stack


def _batches(rank: int, world: int, steps: int) -> Iterator[Mapping[str, Tensor]]:
    text = ByteText(block=BLOCK)
    for step in range(steps):
        first = (step * world + rank) * BATCH
        examples = [text[(7919 * (first + number)) % len(text)] for number in range(BATCH)]
        yield {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def main(asked: Asked) -> None:
    """Train and measure, on every rank alike."""
    from torchft.coordination import LighthouseServer

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    os.environ["DTRAIN_COMPILE"] = "early"  # a long run has its kernels compiled; here they are in the warm-up
    rank, world = dist.get_rank(), dist.get_world_size()
    served = LighthouseServer(bind="[::]:0", min_replicas=world, join_timeout_ms=1000) if rank == 0 else None
    where = [served.address() if served is not None else ""]
    where = gather_json(where)[0]
    names = [THEIRS, *CODECS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sent = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        trainings = {name: _Training(asked, name, where[0], stack) for name in names}
        stream = _batches(rank, world, (asked.warmup + asked.rounds) * asked.every_steps)
        for number in range(asked.warmup + asked.rounds):
            batches = [next(stream) for _ in range(asked.every_steps)]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                before = wire.sent()
                dist.barrier()
                started = time.perf_counter()
                trainings[name].round(batches)
                took = time.perf_counter() - started
                dist.barrier()
                if number >= asked.warmup:
                    seconds[name].append(took)
                    sent[name] += wire.busiest(before, wire.sent())[1]
        for training in trainings.values():
            if training.attached is not None:
                training.attached.detach()
    everybody = gather_json(seconds)
    if rank == 0:
        by_library = {
            name: Trained(
                trainings[name].losses,
                [max(of_ranks) for of_ranks in zip(*(one[name] for one in everybody), strict=True)],
                sent[name] // asked.rounds,
            )
            for name in names
        }
        contents = {name: dataclasses.asdict(trained) for name, trained in by_library.items()}
        Path(asked.out).write_text(json.dumps(contents))
    dist.barrier()
    if served is not None:
        served.shutdown()
    dist.destroy_process_group()


# ---- the report -----------------------------------------------------------------------------------------------------


def torchft(session: Session) -> Report:
    """DiLoCo of torchft and ours on four hosts, links of 1 Gbit/s."""
    with devcluster(nodes=RANKS, bandwidth="1gbit", name=CLUSTER):
        folder = on_hosts(session, RANKS, "benchmarks.vs_torchft", lambda out: dataclasses.asdict(Asked(out)))
    by_library = json.loads(folder.read_text())
    return torchft_report({name: Trained(**trained) for name, trained in by_library.items()}, Asked(""))


def torchft_report(by_library: Mapping[str, Trained], asked: Asked) -> Report:
    """By library and codec."""
    theirs, rows, checks = by_library[THEIRS], [], []
    for name, ours in by_library.items():
        ratio = statistics.median(b / a for a, b in zip(theirs.seconds, ours.seconds, strict=True))
        label = THEIRS if name == THEIRS else f"dtrain, {name}"
        rows.append([
            label, in_time(statistics.median(ours.seconds)), f"{ratio:.3f}", in_bytes(ours.sent_bytes),
            f"{ours.losses[-1]:.5f}",
        ])  # fmt: skip
        if name != THEIRS:
            checks.append(at_most(f"round of {label} over theirs", ratio, 1.0))
        if name not in (THEIRS, OURS):
            checks.append(at_most(f"bytes of {label} over theirs", ours.sent_bytes / theirs.sent_bytes, 0.999))
    apart = [abs(a - b) / abs(a) for a, b in zip(theirs.losses, by_library[OURS].losses, strict=True)]
    compared = min(COMPARED, len(apart))
    checks.append(at_most(f"largest difference of a loss in {compared} steps, relative", max(apart[:compared]), 1e-4))
    largest = [max(apart[start : start + asked.every_steps]) for start in range(0, len(apart), asked.every_steps)]
    body = (
        f"DiLoCo of torchft{_version()} and of dtrain on {RANKS} hosts of `dtrain cluster` with links of 1 Gbit/s, "
        f"all on two cores: the same transformer ({asked.model[0]} wide, {asked.model[1]} layers), the same text, "
        f"rounds of {asked.every_steps} steps, AdamW inside, Nesterov 0.7 / 0.9 outside; both take the plain module, "
        f"and in fp32 gloo's own all-reduce. {asked.rounds} rounds of each in turn "
        f"after {asked.warmup} of warm-up, of the slowest rank, medians; the ratio is the median of the rounds'. Sent: "
        "by the interface of rank 0's host in a round, headers included. Loss: of the last step on rank 0.\n\n"
        + table(["", "round", "over torchft's", "sent per round", "loss"], rows)
        + "\n\nWhere semantics differ: torchft's fragments begin by turns within the first period "
        '(`first_round="early"`); it applies an exchange even where the group was made anew while it was under way; '
        "its replicas count alike, where ours count by tokens. Neither matters here. What is added up in another order "
        "is rounded otherwise, and training makes that grow: the largest difference of a loss, relative, was "
        + ", ".join(f"{largest[number]:.0e} in round {number + 1}" for number in range(1, len(largest), 6))
        + ". A ratio within a percent of 1 is a tie. torchft can quantize its all-reduce, too (`should_quantize`), "
        "which is not measured here."
    )
    figures = {name: dataclasses.asdict(trained) for name, trained in by_library.items()}
    return Report("DiLoCo beside torchft's", body, ("python -m benchmarks torchft",), tuple(checks), figures)


def _version() -> str:
    try:
        return f" {importlib.metadata.version('torchft')}"
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Asked(**{**given, "model": tuple(given["model"])}))
