"""What overlap hides: the time exposed in a round, by how long its exchange takes, on links of falling rate.

``python -m benchmarks.overlap JSON`` on every rank, under any launcher, is what `overlap` runs on two hosts of
`dtrain cluster`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Session, say
from benchmarks.launches import on_hosts
from benchmarks.page import Report, at_most, table
from dtrain import attach, streaming_diloco
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.transports.json_gather import gather_json
from dtrain.compress import quantize
from dtrain.outer import sgd
from dtrain.slurm.devcluster import devcluster
from dtrain.train.models.transformer import Transformer
from tests.programs.hosts import CLUSTER

RANKS, EVERY, OVERLAP, ROUNDS, WARMUP = 2, 8, 4, 5, 2
RATES = ("400mbit", "150mbit", "80mbit", "50mbit", "40mbit", "30mbit", "24mbit", "20mbit", "16mbit")
LENGTH, BATCH = 64, 6


@dataclass(frozen=True)
class Asked:
    """Where to write."""

    out: str


@dataclass(frozen=True)
class Exposure:
    """Seconds, of the slowest rank: of a step; exposed in a round that is waited for, and in one that overlaps."""

    step: float
    waited: float
    overlapped: float


def main(asked: Asked) -> None:
    """Train with and without overlap, on every rank alike."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    os.environ["DTRAIN_COMPILE"] = "early"  # a long run has its kernels compiled; here they are in the warm-up
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(0, 256, (BATCH, LENGTH + 1))
    batch = {"input": tokens[:, :-1], "target": tokens[:, 1:]}
    steps: list[float] = []
    exposed = [_exposed(overlap, batch, steps) for overlap in (0, OVERLAP)]
    seconds = [statistics.median(steps), *exposed]
    everybody = gather_json(seconds)
    if dist.get_rank() == 0:
        exposure = Exposure(*(max(of_ranks) for of_ranks in zip(*everybody, strict=True)))
        Path(asked.out).write_text(json.dumps(dataclasses.asdict(exposure)))
    dist.destroy_process_group()


def _exposed(overlap: int, batch: Mapping[str, torch.Tensor], steps: list[float]) -> float:
    """Seconds exposed in a round; those of steps in which nothing is sent or waited for are added to ``steps``."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Transformer(dim=256, layers=4, heads=4, vocab_size=256, max_length=LENGTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sync = streaming_diloco(
        every_steps=EVERY, layers_per_fragment=0, overlap_steps=overlap, outer=sgd(), compress=quantize(bits=8)
    )
    attached: Attached = attach(model, optimizer, sync)
    before = 0.0
    for step in range((WARMUP + ROUNDS) * EVERY + overlap):
        if step == WARMUP * EVERY + overlap:
            before = attached.meter.exposed_seconds
        started = time.perf_counter()
        model(batch).backward()
        attached.step()
        if 0 < step % EVERY < OVERLAP - 1 and not overlap:
            steps.append(time.perf_counter() - started)
    seconds = (attached.meter.exposed_seconds - before) / ROUNDS
    attached.detach()
    return seconds


# ---- the report -----------------------------------------------------------------------------------------------------


def overlap(session: Session) -> Report:
    """Rounds on two hosts, by rate of the links."""
    exposures = {}
    with devcluster(nodes=RANKS, bandwidth=RATES[0], name=CLUSTER) as cluster:
        for rate in RATES:
            say(f"links of {rate}")
            cluster.shape(rate)
            out = on_hosts(session, RANKS, "benchmarks.overlap", lambda path: dataclasses.asdict(Asked(path)))
            exposures[rate] = Exposure(**json.loads(out.read_text()))
    return overlap_report(exposures)


def overlap_report(exposures: Mapping[str, Exposure]) -> Report:
    """By rate, slowest last."""
    step = statistics.median(exposure.step for exposure in exposures.values())
    window = OVERLAP * step
    rows, checks = [], []
    for rate, exposure in exposures.items():
        left = max(0.0, exposure.waited - OVERLAP * exposure.step)
        rows.append([rate, f"{exposure.waited:.2f} s", f"{exposure.overlapped:.2f} s", f"{left:.2f} s"])
        what = f"exposed at {rate}, where an exchange takes {exposure.waited / exposure.step:.1f} steps"
        if exposure.waited < 0.75 * OVERLAP * exposure.step:
            checks.append(at_most(f"{what}, of the exchange", exposure.overlapped / exposure.waited, 0.1))
        elif exposure.waited > 1.25 * OVERLAP * exposure.step:
            off = abs(exposure.overlapped - left) / exposure.waited
            checks.append(at_most(f"{what}: off what is left over, of the exchange", off, 0.15))
    body = (
        f"Two hosts of `dtrain cluster`, all on two cores; a round of {EVERY} steps of a transformer of 3 million "
        f"parameters in 8 bits. Waited for, an exchange takes x seconds; with overlap_steps={OVERLAP} it travels while "
        f"{OVERLAP} steps of {step:.2f} s go on, and what is exposed should be max(0, x - {window:.2f} s). Means of "
        f"{ROUNDS} rounds, of the slowest rank.\n\n"
        + table(["links", "x, waited for", "exposed with overlap", "x less the steps"], rows)
        + "\n\n"
        + _plot([one.waited for one in exposures.values()], [one.overlapped for one in exposures.values()])
    )
    figures = {rate: dataclasses.asdict(exposure) for rate, exposure in exposures.items()}
    return Report("What overlap hides", body, ("python -m benchmarks overlap",), tuple(checks), figures)


def _plot(waited: list[float], exposed: list[float]) -> str:
    """As a Mermaid chart, which GitHub and most viewers of Markdown draw."""
    return "\n".join([
        "```mermaid", "xychart-beta", '    title "Exposed with overlap, by how long the exchange takes"',
        f'    x-axis "the exchange, seconds" [{", ".join(f"{seconds:.2f}" for seconds in waited)}]',
        f'    y-axis "exposed, seconds" 0 --> {max(*exposed, 0.1):.1f}',
        f"    line [{', '.join(f'{seconds:.3f}' for seconds in exposed)}]", "```",
    ])  # fmt: skip


if __name__ == "__main__":
    main(Asked(**json.loads(sys.argv[1])))
