"""The report on fused kernels: how fast a core goes over memory with them, beside a copy of the same memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.harness import Session, say
from benchmarks.page import Check, Report, at_least, table
from tests.programs.hosts import ROOT, environment

ELEMENTS, ROWS, BLOCK, ROUNDS = 1 << 25, 4, 512, 15
LINES = {"8 bits": 0.6, "4 bits": 0.4, "feedback + 8 bits": 0.25, "decode and mean of four": 0.2}
WHAT = {
    "8 bits": "quantize",
    "4 bits": "quantize and pack",
    "feedback + 8 bits": "add the residual, quantize, keep the new residual",
    "decode and mean of four": "four payloads of 8 bits, per fp32 element that comes out",
}


@dataclass(frozen=True)
class Speed:
    """``ratio``: of a copy's time to this one's, the median of pairs. ``allocations``: in one call."""

    ratio: float
    allocations: int


def kernels(session: Session) -> Report:
    """Each kernel eagerly and compiled, in one process on one core."""
    say("python -m benchmarks.kernels")
    variables = {**environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, "-m", "benchmarks.kernels"],
        cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the kernels ended with exit code {done.returncode}")
    speeds = json.loads(done.stdout.splitlines()[-1])
    return kernels_report({name: {how: Speed(**speed) for how, speed in by.items()} for name, by in speeds.items()})


def kernels_report(speeds: Mapping[str, Mapping[str, Speed]]) -> Report:
    """By name of the kernel and "eager" or "compiled"."""
    rows = [
        [name, WHAT[name], f"{by['eager'].ratio:.3f}", f"{by['compiled'].ratio:.3f}", f"{by['compiled'].allocations}"]
        for name, by in speeds.items()
    ]
    body = (
        f"{ELEMENTS / 2**20:.0f} Mi elements in fp32, which no cache holds, on one core, in blocks of {BLOCK}. "
        f"{ROUNDS} pairs of a copy of the input and the kernel, both into memory that is there already; the median of "
        f"the ratios "
        "of their times, so that 1 is as fast as a copy. Compiled and eager kernels give the same bits "
        "(tests/comm/test_kernels.py).\n\n"
        + table(["kernel", "does", "eager", "compiled", "allocations per call"], rows)
    )
    checks = [at_least(f"{name}, compiled, as a share of a copy", by["compiled"].ratio, LINES[name])
              for name, by in speeds.items()]  # fmt: skip
    allocated = sum(by["compiled"].allocations for by in speeds.values())
    checks.append(Check("allocations per call of compiled kernels", f"{allocated}", "none", allocated == 0))
    figures = {name: {how: speed.ratio for how, speed in by.items()} for name, by in speeds.items()}
    return Report("Fused kernels", body, ("python -m benchmarks kernels",), tuple(checks), figures)


def measure() -> dict[str, dict[str, Speed]]:
    """In this process."""
    import torch
    from torch import Tensor

    from dtrain.comm.compressors import quantize as q

    torch.set_num_threads(1)
    shape = (ROWS, ELEMENTS // ROWS // BLOCK, BLOCK)
    values, residual = torch.randn(shape), torch.randn(shape) * 0.01
    room, scales = torch.empty(shape), torch.empty(*shape[:2], 2)
    codes = {bits: torch.empty(*shape[:2], BLOCK * bits // 8, dtype=torch.uint8) for bits in (8, 4)}
    many = (1, ELEMENTS // BLOCK, BLOCK)
    payload = torch.randint(0, 256, (4, *many[1:]), dtype=torch.uint8)
    units, mean = torch.rand(4, many[1], 2), torch.empty(many)
    calls: dict[str, Callable[[], None]] = {
        "8 bits": lambda: q.encode_nearest(values, codes[8], scales, grid="max_min", bits=8),
        "4 bits": lambda: q.encode_nearest(values, codes[4], scales, grid="max_min", bits=4),
        "feedback + 8 bits": lambda: q.encode_sum_nearest(
            values, residual, codes[8], scales, room, grid="max_min", bits=8
        ),
        "decode and mean of four": lambda: q.mean_of_blocks(payload, units, mean, grid="max_min", bits=8, world=4),
    }

    def copied(into: Tensor) -> float:
        started = time.perf_counter()
        into.copy_(values)
        return time.perf_counter() - started

    def ratio(call: Callable[[], None], rounds: int) -> float:
        into, ratios = torch.empty(shape), []
        call()
        for _ in range(rounds):
            plain, started = copied(into), time.perf_counter()
            call()
            ratios.append(plain / (time.perf_counter() - started))
        return statistics.median(ratios)

    def allocations(call: Callable[[], None]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        return sum(event.cpu_memory_usage > 0 for event in profiler.events() if event.name == "[memory]")

    out: dict[str, dict[str, Speed]] = {name: {} for name in calls}
    for how, policy in (("eager", "never"), ("compiled", "always")):
        os.environ["DTRAIN_COMPILE"] = policy
        for name, call in calls.items():
            call()
            out[name][how] = Speed(ratio(call, ROUNDS), allocations(call))
    return out


if __name__ == "__main__":
    print(json.dumps({name: {how: vars(speed) for how, speed in by.items()} for name, by in measure().items()}))
