"""The reports on what compression gains in time, on the shaped links of `dtrain cluster`."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping

from benchmarks.harness import Session
from benchmarks.launches import on_hosts
from benchmarks.page import Report, at_least, at_most, table
from benchmarks.step_timing import Asked, Took
from dtrain.report.figures import in_bytes, in_time
from dtrain.slurm.devcluster import devcluster
from tests.programs.hosts import CLUSTER

RATES = ("100mbit", "1gbit", "none")
PAIRS = 21
THEIRS, OURS = "torch.powersgd", ("powersgd_ef:all_reduce", "powersgd_ef")
CHOSEN = "powersgd16_ef"
"""The exchange that is held to the lines; its loss after 500 steps is in the report "loss"."""
SLOW = ("nothing", "torch.all_reduce", "int8_ef", "int4_ef", "topk_ef", "powersgd_ef", CHOSEN)
SEQUENCES, BUCKET_MIB = 10, 6
LOCAL = {
    "nothing/50": 0.0,
    "torch.all_reduce": 0.0,
    "diloco/50:int8": 0.93,
    "streaming_diloco/50:e3m0": 0.95,
    "co2/12:int8": 0.95,
}
"""Local updates, and the compute utilization that they are held to."""
ALONE, ALONE_SECONDS = "nothing/50", 0.84
LOCAL_SEQUENCES, LOCAL_LENGTH = 20, 16
"""Tried first; what is measured has as many as make a step without communication take ALONE_SECONDS: short ones, as one
of 64 tokens takes a fifth of that."""


def powersgd(session: Session) -> Report:
    """PyTorch's PowerSGD hook and ours, steps in turn, on four hosts."""
    times = {}
    for rate in RATES:
        with devcluster(nodes=4, bandwidth=rate, name=CLUSTER):
            times[rate] = steps(session, 4, (THEIRS, *OURS), rounds=PAIRS)
    return powersgd_report(times)


def slow(session: Session) -> Report:
    """Steps of a transformer of 17 million parameters over 100 Mbit/s, and bytes from 2 to 8 ranks."""
    with devcluster(nodes=4, bandwidth="100mbit", name=CLUSTER):
        times = steps(session, 4, SLOW, rounds=9, batch=SEQUENCES, bucket_mib=BUCKET_MIB)
    by_ranks = {}
    for ranks in (2, 4, 8):
        with devcluster(nodes=ranks, bandwidth="none", name=CLUSTER):
            by_ranks[ranks] = steps(session, ranks, ("int8_ef",), rounds=2)["int8_ef"].payload_bytes
    return slow_report(times, by_ranks)


def local(session: Session) -> Report:
    """Steps of local updates on the same model and links, their rounds included."""
    with devcluster(nodes=4, bandwidth="100mbit", name=CLUSTER):
        length = LOCAL_LENGTH
        alone = steps(session, 4, (ALONE,), rounds=1, batch=LOCAL_SEQUENCES, length=length, warmup=1, apart=True)
        tried = alone[ALONE].median
        batch = max(1, round(LOCAL_SEQUENCES * ALONE_SECONDS / tried))
        times = steps(session, 4, (*LOCAL,), rounds=7, batch=batch, length=length, warmup=1, beside=ALONE, apart=True)
    return local_report(times, batch)


def steps(
    session: Session,
    ranks: int,
    exchanges: tuple[str, ...],
    *,
    rounds: int,
    batch: int = 1,
    length: int = 64,
    bucket_mib: float = 25,
    warmup: int = 4,
    beside: str = "",
    apart: bool = False,
) -> dict[str, Took]:
    """Steps on the cluster that is up, one rank on each host. Raises ``RuntimeError`` with what was printed."""

    def asked(out: str) -> dict[str, object]:
        how = {"bucket_mib": bucket_mib, "warmup": warmup, "beside": beside, "apart": apart}
        return dataclasses.asdict(Asked(out, exchanges, rounds, batch, length, **how))  # type: ignore[arg-type]

    times = json.loads(on_hosts(session, ranks, "benchmarks.step_timing", asked).read_text())
    return {name: Took(**took) for name, took in times.items()}


# ---- from what was measured -----------------------------------------------------------------------------------------


def powersgd_report(times: Mapping[str, Mapping[str, Took]]) -> Report:
    """By rate, theirs and ours."""
    rows, checks, figures = [], [], {}
    for rate, by in times.items():
        theirs, links = by[THEIRS], "unshaped" if rate == "none" else rate
        rows.append([links, THEIRS, in_time(theirs.median), "", *_bytes(theirs)])
        for name in OURS:
            ours = by[name]
            ratio = statistics.median(b / a for a, b in zip(theirs.seconds, ours.seconds, strict=True))
            rows.append([links, name, in_time(ours.median), f"{ratio:.3f}", *_bytes(ours)])
            checks.append(at_most(f"step time of {name} over theirs, {links}", ratio, 1.05))
        payload = by[OURS[0]].payload_bytes / theirs.payload_bytes
        checks.append(at_most(f"bytes of {OURS[0]} over theirs, {links}", payload, 1.0))
        figures[rate] = {name: dataclasses.asdict(took) for name, took in by.items()}
    body = (
        "PyTorch's PowerSGD hook and `powersgd_ef`, rank 4, on the same transformer of 17 million parameters in "
        f"DDP, one sequence of 64 tokens for each rank, in the same processes, {len(theirs.seconds)} rounds of one "
        "step each in rotating order after a warm-up; four hosts of `dtrain cluster`, all on two cores. Times are "
        "those of the slowest rank, medians; the ratio is the median of the rounds' ratios. Theirs has all "
        "gradients in one bucket, without overlap, as over gloo it fails with two; ours has DDP's usual ones. On the "
        "all-reduce, as theirs is, ours sends the same numbers; on the two-phase route, whose bits depend on nothing "
        "but the values, a byte for each message and rank more. Payload: as ours is metered and theirs counts itself; "
        "interface: "
        "what that of rank 0's host counted, headers and acknowledgements included."
        "\n\n" + table(["links", "exchange", "step", "over theirs", "payload per step", "interface"], rows)
    )
    commands = ("python -m benchmarks powersgd",)
    return Report("PowerSGD beside PyTorch's", body, commands, tuple(checks), figures)


def _bytes(took: Took) -> list[str]:
    return [f"{took.payload_bytes:,} B", in_bytes(took.sent_bytes)]


def slow_report(times: Mapping[str, Took], by_ranks: Mapping[int, int]) -> Report:
    """Steps by exchange, and payload of int8_ef by number of ranks."""
    alone, plain = times["nothing"].median, times["torch.all_reduce"].median
    rows = [
        [
            name,
            in_time(took.median),
            f"{plain / took.median:.2f}x",
            f"{took.median / alone:.2f}x",
            in_bytes(took.sent_bytes),
        ]
        for name, took in times.items()
    ]
    chosen = times[CHOSEN].median
    growth = {ranks: sent / by_ranks[2] / ((ranks - 1) / ranks / 0.5) for ranks, sent in by_ranks.items()}
    body = (
        "A transformer of 17 million parameters in DDP on four hosts of `dtrain cluster` with links of 100 Mbit/s, all "
        f"of them on two cores; {SEQUENCES} sequences of 64 tokens for each rank, buckets of {BUCKET_MIB} MiB, kernels "
        f"compiled. Steps of all exchanges in turn, {len(times['nothing'].seconds)} each, of the slowest rank; medians "
        "are given. *nothing* does not communicate at all.\n\n"
        + table(["exchange", "step", "faster than fp32", "of the step without", "sent per step"], rows)
        + "\n\nWhat int8_ef sends per rank and step by the two-phase route, which fp32 by all-reduce sends "
        f"{times['torch.all_reduce'].sent_bytes / times['int8_ef'].sent_bytes:.1f} times of (above):\n\n"
        + table(["ranks", "payload per rank", "over 2 ranks', less (n - 1) / n"],
                [[f"{ranks}", in_bytes(sent), f"{growth[ranks]:.4f}"] for ranks, sent in by_ranks.items()])
    )  # fmt: skip
    checks = (
        at_least(f"{CHOSEN}, faster than fp32 all-reduce", plain / chosen, 5, "x"),
        at_most(f"{CHOSEN}, of the step without communication", chosen / alone, 1.25, "x"),
        at_most("growth of bytes per rank from 2 to 8 ranks, less (n - 1) / n", growth[8], 1.01),
    )
    figures: dict[str, object] = {name: dataclasses.asdict(took) for name, took in times.items()}
    return Report(
        "A slow network",
        body,
        ("python -m benchmarks slow",),
        checks,
        {**figures, "payload_by_ranks": dict(by_ranks)},
    )


def local_report(times: Mapping[str, Took], batch: int) -> Report:
    """Steps by method; compute utilization is the step without communication over the step with it."""
    alone = times[ALONE].median
    used = {name: took.utilization if took.beside else 1.0 for name, took in times.items()}
    rows = [
        [name, in_time(took.median), f"{used[name]:.3f}", in_bytes(took.sent_bytes)] for name, took in times.items()
    ]
    body = (
        "A transformer of 17 million parameters in DDP on four hosts of `dtrain cluster` with links of 100 Mbit/s, "
        f"each kept to one core, which they share evenly; {batch} sequences of {LOCAL_LENGTH} tokens for each rank, "
        f"kernels compiled. Whole rounds of some {ALONE.partition('/')[2]} steps in turn, "
        f"{len(times['torch.all_reduce'].seconds)} times; a step is a part of that, of the slowest rank, medians. As "
        "many steps without communication are timed before and after (before only, of fp32's single step); "
        "compute utilization is the mean of the two over "
        "the step between, the median of the rounds. Methods that overlap their rounds are timed from their "
        "second one on. *diloco/50:int8*: rounds of 50 steps, 8 bits.\n\n"
        + table(["method", "step", "compute utilization", "sent per step"], rows)
    )
    checks = [at_least(f"compute utilization of {name}", used[name], line) for name, line in LOCAL.items() if line]
    checks.append(at_most("compute utilization of fp32 data parallelism", used["torch.all_reduce"], 0.15))
    checks.append(at_most("step without communication, off 0.8 s", abs(alone - 0.8), 0.1, " s"))
    figures = {name: dataclasses.asdict(took) for name, took in times.items()}
    return Report("Local updates on a slow network", body, ("python -m benchmarks local",), tuple(checks), figures)
