"""The timing loop of one rank: warm-up, then iterations that all ranks begin together, timed on each of them."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dtrain.bench.ops import bus_factor, prepare
from dtrain.bench.rows import Row
from dtrain.bench.settings import Settings
from dtrain.comm.drivers.run import Channel

__all__ = ["measure"]

BUSY = 0.9  # of all cores, above which the processor is what was measured
FAR_FROM_LINK = 0.85


def measure(op: str, size: int, settings: Settings, channel: Channel) -> Row:
    """One row; the same on every rank. Collective over the default process group."""
    world = channel.places["replicate"].size
    case = prepare(op, size, getattr(torch, settings.dtype), channel)
    for _ in range(settings.warmup):
        case.run()
    wrong = case.wrong()
    times: list[float] = []
    dist.barrier()
    counted, cpu, began = _sent_bytes(), _cpu(), time.perf_counter()
    deadline = began + settings.seconds
    for iteration in range(settings.iterations):
        dist.barrier()
        started = time.perf_counter()
        case.run()
        times.append(time.perf_counter() - started)
        if iteration % 4 == 3 and _anybody(time.perf_counter() > deadline):
            break
    wrong += case.wrong()
    sent = _per_rank(counted, _sent_bytes()) // len(times)
    busy = _busy(cpu, _cpu())
    everybody: list[tuple[list[float], int, int, float, str]] = [([], 0, 0, 0.0, "")] * world
    dist.all_gather_object(everybody, (times, sent, wrong, busy, socket.gethostname()))
    return _row(op, size, settings, world, everybody)


def _row(
    op: str, size: int, settings: Settings, world: int, everybody: list[tuple[list[float], int, int, float, str]]
) -> Row:
    together = sorted(max(of_ranks) for of_ranks in zip(*(times for times, *_ in everybody), strict=True))
    totals = [sum(times) for times, *_ in everybody]
    slowest = totals.index(max(totals))
    middle = _percentile(together, 0.5)
    busbw = 8 * bus_factor(op, world) * size / middle / 1e6
    busy = max(busy for *_, busy, _ in everybody)
    share = busbw / settings.link_mbit if settings.link_mbit else 1.0
    invalid = "the processor is the limit" if busy > BUSY and share < FAR_FROM_LINK else ""
    return Row(
        op=op, transport=settings.transport, dtype=settings.dtype, world=world, bytes=size,
        iterations=len(together), min_ms=1e3 * together[0], p50_ms=1e3 * middle,
        p95_ms=1e3 * _percentile(together, 0.95), p99_ms=1e3 * _percentile(together, 0.99), max_ms=1e3 * together[-1],
        algbw_mbit=8 * size / middle / 1e6, busbw_mbit=busbw, sent_bytes=max(sent for _, sent, *_ in everybody),
        optimal_bytes=round(bus_factor(op, world) * size), link_mbit=settings.link_mbit, slowest_rank=slowest,
        slowest_host=everybody[slowest][4], wrong=sum(wrong for _, _, wrong, _, _ in everybody), cpu_busy=busy,
        invalid=invalid,
    )  # fmt: skip


def _percentile(ordered: list[float], share: float) -> float:
    """The nearest rank.

    >>> _percentile([1.0, 2.0, 3.0], 0.5)
    2.0
    """
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _anybody(over: bool) -> bool:
    """Whether any rank says so: all must leave the loop together."""
    told = torch.tensor([int(over)])
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def _sent_bytes() -> dict[str, int]:
    """What each interface of this host has sent. From /proc, as /sys shows those of another network namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return {name.strip(): int(figures.split()[8]) for name, _, figures in (line.partition(":") for line in lines)}


def _per_rank(before: dict[str, int], after: dict[str, int]) -> int:
    """Bytes that the busiest interface sent in between, shared among this host's ranks."""
    most = max((after[name] - before.get(name, 0) for name in after), default=0)
    return most // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cpu() -> tuple[float, float]:
    """(busy, all) seconds of all cores of this machine."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / hertz, sum(ticks) / hertz


def _busy(before: tuple[float, float], after: tuple[float, float]) -> float:
    passed = after[1] - before[1]
    return (after[0] - before[0]) / passed if passed else 0.0
