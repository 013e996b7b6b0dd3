"""The clock against published figures, its own budget, and what real runs send.

The table is Streaming DiLoCo's (Douillard et al., arXiv:2501.18512, table 4). Its simulator was not published; what is
described is followed: nodes of a graph that begin when their inputs are there, links without latency, two replicas.
What is simulated here are dtrain's syncs themselves.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from benchmarks.harness import Session, say
from benchmarks.page import Check, Report, at_least, at_most, table
from dtrain import diloco, every_step, streaming_diloco
from dtrain.comm.clock.channel import Machine
from dtrain.comm.clock.clock import Clock, Engine
from dtrain.comm.clock.failures import Failures
from dtrain.comm.clock.network import Level, Link, Network
from dtrain.comm.clock.step import Step
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.runtime.method import Sync
from dtrain.compress import cast, quantize
from tests.programs.hosts import ROOT, environment

GRID = [10 ** (-1 + 4 * number / 49) for number in range(50)]
"""Gbit/s: all published figures are of these, a factor of 1.21 apart."""
SHARE = 0.83
"""Of a model's nominal parameters, in 16 bits: the one constant, which the published table has for all of its cells."""
UTILIZATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)
MODELS: Mapping[str, tuple[float, int, float]] = {"1B": (1e9, 24, 0.1), "10B": (1e10, 48, 0.8)}
"""Parameters, layers, seconds of a step."""
PUBLISHED: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "1B": {
        "data parallelism": (86.8, 152.6, 184.2, 222.3, 569.0), "DiLoCo": (1.4, 6.2, 13.3, 23.3, 86.8),
        "streaming": (1.4, 5.2, 9.1, 16.0, 28.1), "streaming, overlap": (1.4, 4.3, 6.2, 9.1, 11.0),
        "streaming, overlap, FP4": (0.4, 0.9, 1.7, 2.0, 3.0),
    },
    "10B": {
        "data parallelism": (104.8, 222.3, 222.3, 268.3, 471.5), "DiLoCo": (1.7, 7.5, 16.0, 33.9, 104.8),
        "streaming": (1.7, 5.2, 9.1, 13.3, 19.3), "streaming, overlap": (1.7, 3.6, 5.2, 6.2, 7.5),
        "streaming, overlap, FP4": (0.4, 0.9, 1.4, 1.4, 1.7),
    },
}  # fmt: skip
BF16 = cast("bf16")
SYNCS: Mapping[str, Callable[[], Sync]] = {
    "data parallelism": lambda: every_step(compress=BF16, verify_every=0),
    "DiLoCo": lambda: diloco(every_steps=100, compress=BF16, verify_every=0),
    "streaming": lambda: _streaming(0, BF16),
    "streaming, overlap": lambda: _streaming(1, BF16),
    "streaming, overlap, FP4": lambda: _streaming(1, quantize("e3m0", block=256)),
}
REPLICAS, LAYERS, STEPS = 10_000, 100, 210


def _streaming(overlap: int, compress: Compressor) -> Sync:
    return streaming_diloco(
        every_steps=100, layers_per_fragment=3, overlap_steps=overlap, compress=compress, verify_every=0
    )


def utilization(session: Session) -> Report:
    """The published table, and 10,000 replicas."""
    found = {model: {sync: needed(model, sync) for sync in syncs} for model, syncs in PUBLISHED.items()}
    say("python -m benchmarks.utilization")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.utilization"], cwd=ROOT, env={**environment(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the clock of {REPLICAS} replicas ended with exit code {done.returncode}")
    seconds, gib = map(float, done.stdout.split())
    return utilization_report(found, seconds, gib)


def utilization_report(found: Mapping[str, Mapping[str, tuple[int, ...]]], seconds: float, gib: float) -> Report:
    """``found``: places on the grid; ``seconds`` of a core and ``gib`` of memory for 10,000 replicas."""
    rows, near, cells = [], 0, 0
    for model, syncs in PUBLISHED.items():
        for sync, published in syncs.items():
            row = [f"{model}, {sync}"]
            for rate, place in zip(published, found[model][sync], strict=True):
                notches = place - _place(rate)
                near, cells = near + (abs(notches) <= 1), cells + 1
                row.append(f"{GRID[place]:.1f} ({rate:g}){'' if abs(notches) <= 1 else f' {notches:+d}'}")
            rows.append(row)
    body = (
        "Gbit/s that two replicas need for a compute utilization of 50 to 99 %: by the clock, and as published (in "
        "brackets); a number behind says how many notches of the grid a cell is off, where it is more than one. A "
        f"notch is a factor of {GRID[1] / GRID[0]:.2f}, and so is the resolution of what is published. No constant is "
        f"fitted to a cell; one is of all: models have {SHARE:g} of their nominal parameters, in 16 bits. Steps are "
        "forward and backward passes, a third and two thirds, of equal layers; links have no latency.\n\n"
        + table(["model, sync", *(f"{share:.0%}" for share in UTILIZATIONS)], rows)
        + f"\n\n{REPLICAS:,} replicas of {LAYERS} layers under Streaming DiLoCo, {STEPS} steps with a failure an hour, "
        f"took {seconds:.1f} s of one core and {gib:.2f} GiB, imports included."
    )
    checks = (
        at_least("cells within one notch, of 50", near / cells * 100, 96, " %"),
        at_most(f"{REPLICAS:,} replicas, seconds of one core", seconds, 10, " s"),
        Check(f"{REPLICAS:,} replicas, memory", f"{gib:.2f} GiB", "below 2 GiB", gib < 2),
    )
    figures = {"notches": {m: {s: list(p) for s, p in syncs.items()} for m, syncs in found.items()},
               "seconds": seconds, "gib": gib}  # fmt: skip
    return Report("Compute utilization by the clock", body, ("python -m benchmarks utilization",), checks, figures)


def needed(model: str, sync: str) -> tuple[int, ...]:
    """The first places on the grid that reach each of `UTILIZATIONS`."""
    reached: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in reached:
            reached[place] = walked(model, sync, GRID[place])
        return reached[place]

    places = []
    for wanted in UTILIZATIONS:
        low, high = 0, len(GRID) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle) >= wanted else (middle + 1, high)
        places.append(low)
    return tuple(places)


def walked(model: str, sync: str, gbit: float) -> float:
    """The utilization between two sites, in the steady state."""
    parameters, layers, seconds = MODELS[model]
    shapes = {f"layers.{layer}.weight": (int(SHARE * parameters / layers),) for layer in range(layers)}
    rate = gbit * 1e9 / 8
    clock = Clock(
        SYNCS[sync](), Step.even(shapes, seconds), Network((Level("sites", 2, Link(rate, rate)),), "ring"),
        engine=Engine("fsdp"), machine=Machine("data"),
    )  # fmt: skip
    before, steps = (2, 4) if sync == "data parallelism" else (100, 200)
    clock.train(before)
    return clock.train(steps).utilization


def _place(rate: float) -> int:
    return min(range(len(GRID)), key=lambda place: abs(math.log(GRID[place] / rate)))


def main() -> None:
    """Seconds of a core and GiB of memory of 10,000 replicas."""
    shapes = {f"layers.{layer}.{name}.weight": (10_240, width) for layer in range(LAYERS)
              for name, width in (("attention", 40_960), ("mlp", 81_920))}  # fmt: skip
    clock = Clock(
        streaming_diloco(every_steps=100, layers_per_fragment=3), Step.even(shapes, 60.0),
        Network.of(f"link=10gbit,10ms nodes={REPLICAS} backend=doubling"), failures=Failures(1, policy="members"),
    )  # fmt: skip
    clock.train(STEPS)
    print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


if __name__ == "__main__":
    main()
