"""The timing loop of one rank: warm-up, then iterations that all ranks begin together, timed on each of them."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from dtrain.bench import wire
from dtrain.bench.load import Load, Watch, of_machines, why_invalid
from dtrain.bench.ops import Case, bus_factor, prepare
from dtrain.bench.rows import Row
from dtrain.bench.settings import Settings, link_mbit
from dtrain.comm.channel import Channel
from dtrain.comm.transports.json_gather import gather_json

__all__ = ["Bench", "RankReport", "row"]

VOTE_EVERY = 16  # iterations, and after the 1st, 2nd, 4th and 8th: a vote takes a collective of its own
SYNCHRONISATIONS = 10


@dataclass(frozen=True)
class RankReport:
    """One rank's figures of a row. ``seconds``: of each iteration. ``sent_bytes``: per iteration, of this rank."""

    seconds: list[float]
    interface: str
    sent_bytes: int
    wrong: int
    load: Load
    host: str


class Bench:
    """Measures rows, on every rank alike.

    Args:
        channel: for the ops of `comm`; the native ones go over the default process group.
        backends: of native ops and of those of `comm`: gloo, nccl or mpi.
        control: a gloo group that starts and stops iterations, so that those work with any backend.
    """

    def __init__(
        self, settings: Settings, channel: Channel, device: torch.device, *, backends: tuple[str, str],
        control: dist.ProcessGroup,
    ) -> None:  # fmt: skip
        self._settings, self._channel, self._device, self._control = settings, channel, device, control
        self._backends = backends
        self._watch = Watch()
        before = wire.sent()
        for _ in range(SYNCHRONISATIONS):
            self._synchronise()
        self._overhead = {name: (b - before.get(name, 0)) / SYNCHRONISATIONS for name, b in wire.sent().items()}

    def measure(self, op: str, size: int) -> Row:
        """One row, the same on every rank."""
        case = prepare(op, size, getattr(torch, self._settings.dtype), self._channel, self._device)
        backend = self._backends[op.startswith("comm.")]
        return self.measure_case(op, case, backend=backend, like=op, warmup=self._settings.warmup)

    def measure_case(self, op: str, case: Case, *, backend: str, like: str, warmup: int) -> Row:
        """One row of any case, the same on every rank. ``like``: the op whose optimum it is held to."""
        settings = self._settings
        for _ in range(warmup):
            self._once(case)
        self._synchronise()
        wrong = case.wrong() if warmup else 0
        self._synchronise()
        before, began = wire.sent(), self._watch.look()
        times: list[float] = []
        votes = 0
        while len(times) < settings.iterations:
            times.append(self._once(case))
            if len(times) in (1, 2, 4, 8) or len(times) % VOTE_EVERY == 0:
                votes += 1
                if self._any_rank(time.perf_counter() - began > settings.seconds):
                    break
        self._synchronise()  # what is in a sender's kernel has been sent once the receivers have it
        interface, sent = wire.busiest(before, wire.sent())
        load = self._watch.since(began)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        sent = max(0, round((sent - (len(times) + votes + 1) * self._overhead.get(interface, 0.0)) / len(times)))
        report = RankReport(times, interface, sent // ranks_here, wrong + case.wrong(), load, socket.gethostname())
        gathered = gather_json(asdict(report), self._control)
        reports = [RankReport(**{**fields, "load": Load(**fields["load"])}) for fields in gathered]
        return row(op, backend, settings, case.bytes, reports, like=like)

    def _once(self, case: Case) -> float:
        """Seconds of one iteration on this rank."""
        case.reset()
        self._finish()
        self._synchronise()
        started = time.perf_counter()
        case.run()
        self._finish()
        return time.perf_counter() - started

    def _finish(self) -> None:
        """Wait for the device: collectives on CUDA return before they are done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _synchronise(self) -> None:
        dist.barrier(group=self._control)

    def _any_rank(self, over: bool) -> bool:
        """Whether ``over`` on any rank: all must leave the loop together."""
        flag = torch.tensor([int(over)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flag)


def row(
    op: str, backend: str, settings: Settings, size: int, reports: Sequence[RankReport], *, like: str | None = None
) -> Row:
    """The row made of all ranks' reports, in rank order. ``like``: the op whose optimum it is held to."""
    world = len(reports)
    factor = bus_factor(like or op, world)
    together = sorted(max(of_ranks) for of_ranks in zip(*(report.seconds for report in reports), strict=True))
    totals = [sum(report.seconds) for report in reports]
    slowest = totals.index(max(totals))
    middle = statistics.median(together)
    link = link_mbit(settings.link)
    busbw = 8 * factor * size / middle / 1e6
    busy, foreign = of_machines(report.load for report in reports)
    most = max(reports, key=lambda report: report.sent_bytes)
    return Row(
        op=op, backend=backend, dtype=settings.dtype, world=world, bytes=size, iterations=len(together),
        min_ms=1e3 * together[0], p50_ms=1e3 * middle, p95_ms=1e3 * percentile(together, 0.95),
        p99_ms=1e3 * percentile(together, 0.99), max_ms=1e3 * together[-1], algbw_mbit=8 * size / middle / 1e6,
        busbw_mbit=busbw, interface=most.interface, sent_bytes=most.sent_bytes,
        optimal_bytes=round(factor * size), link_mbit=link, slowest_rank=slowest,
        slowest_host=reports[slowest].host, slowest_by=totals[slowest] / statistics.median(totals) - 1,
        wrong=sum(report.wrong for report in reports), cpu_busy=busy, cpu_foreign=foreign,
        invalid=why_invalid(busy, foreign, busbw / link if link else 0.0),
    )  # fmt: skip


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that ``share`` of all are at or below.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0, 3.0, 4.0], 0.95)
    (2.0, 4.0)
    """
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
