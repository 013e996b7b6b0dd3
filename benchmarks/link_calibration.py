"""The report on links: what `dtrain cluster` shapes, and what `dtrain bench collectives` measures on it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Session, say
from benchmarks.page import Check, Report, at_least, at_most, table
from dtrain.bench.fit import errors, fit, predict
from dtrain.bench.rows import Row, read
from dtrain.slurm.devcluster import Cluster, devcluster
from tests.programs.hosts import CLUSTER

LARGE = 16_000_000
THEIRS, OURS = "all_to_all", "comm.all_to_all"
SIZES = ("bench.min_bytes=4000", "bench.max_bytes=4M", "bench.factor=5")

# A byte there and back, over one connection: the median of 25, in milliseconds.
ROUND_TRIP = """
import socket, statistics, sys, time
if sys.argv[1] == "serve":
    with socket.create_server(("", 5555)) as listener:
        connection, _ = listener.accept()
        while byte := connection.recv(1):
            connection.send(byte)
else:
    with socket.create_connection((sys.argv[1], 5555)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(25):
            started = time.perf_counter()
            connection.send(b"x")
            connection.recv(1)
            times.append(1000 * (time.perf_counter() - started))
        print(statistics.median(times))
"""


def network(session: Session) -> Report:
    """Clusters of four hosts, one after the other."""
    rates, large = {}, (f"bench.min_bytes={LARGE}", f"bench.max_bytes={LARGE}")
    for bandwidth in ("100mbit", "1gbit"):
        with devcluster(nodes=4, bandwidth=bandwidth, name=CLUSTER):
            (rates[bandwidth],) = bench(session, 4, *large)
            if bandwidth == "100mbit":
                scattered = bench(session, 4, *large, f"bench.ops={THEIRS},{OURS}")
    with devcluster(nodes=2, bandwidth="1gbit", name=CLUSTER) as cluster:
        before, after = changed(session, cluster)
    with devcluster(nodes=2, bandwidth="none", latency="10ms", name=CLUSTER) as cluster:
        trip = round_trip(cluster)
    with devcluster(nodes=4, bandwidth="50mbit", latency="5ms", name=CLUSTER):
        sweeps = {world: bench(session, world, *SIZES) for world in (2, 3, 4)}
    return network_report(rates, scattered, (before, after), trip, sweeps)


def bench(session: Session, world: int, *words: str) -> list[Row]:
    """A sweep of all-reduce over ``world`` hosts of the cluster that is up."""
    folder = session.folder / f"bench-{next(session.numbers)}"
    run(folder, world, *words)
    return read(folder / "rows.jsonl")


def run(folder: Path, world: int, *words: str) -> None:
    """A sweep into ``folder``. Raises ``RuntimeError`` with what the command printed if it fails."""
    command = [
        "bench", "collectives", "launcher=slurm", f"launcher.nodes={world}", f"launcher.workers={world}",
        "bench.ops=all_reduce", *words, f"run.dir={folder}",
    ]  # fmt: skip
    say("dtrain " + " ".join(command[:-1]))
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", *command], env={**os.environ, "DTRAIN_CLUSTER": CLUSTER}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"dtrain {' '.join(command)} failed: {done.stdout}{done.stderr}")


def changed(session: Session, cluster: Cluster) -> tuple[float, float]:
    """Mbit/s of all-reduce in one running job, before and after the links were made ten times slower."""
    folder = session.folder / f"bench-{next(session.numbers)}"
    size = (f"bench.min_bytes={LARGE // 4}", f"bench.max_bytes={LARGE // 4}")
    # The same row, often enough to change the links in between: each op that is named is measured.
    words = (*size, "bench.ops=" + ",".join(["all_reduce"] * 8), "bench.seconds=4", "bench.iterations=100")
    job = threading.Thread(target=run, args=(folder, 2, *words))
    job.start()
    while len(read(folder / "rows.jsonl")) < 2 and job.is_alive():
        time.sleep(0.1)
    cluster.shape("100mbit")
    job.join()
    rates = [row.busbw_mbit for row in read(folder / "rows.jsonl")]
    return rates[0], rates[-1]


def round_trip(cluster: Cluster) -> float:
    """Milliseconds of one byte from c2 to c1 and back."""
    server = subprocess.Popen(
        ["nsenter", "--target", str(cluster.facts.pids["c1"]), "--net", "--", sys.executable, "-c", ROUND_TRIP, "serve"]
    )
    with server:
        time.sleep(1)
        return float(cluster.run([sys.executable, "-c", ROUND_TRIP, "c1"], host="c2").stdout)


def network_report(
    rates: dict[str, Row],
    scattered: Sequence[Row],
    change: tuple[float, float],
    trip: float,
    sweeps: Mapping[int, Sequence[Row]],
) -> Report:
    """The lines of the issue on launchers that concern links. Raises ``RuntimeError`` if a row is not to be trusted.

    ``rates``: of all-reduce, by link. ``scattered``: of all-to-all, theirs and ours.
    """
    every = [*rates.values(), *scattered, *(row for rows in sweeps.values() for row in rows)]
    if bad := [f"{row.bytes} bytes over {row.world}: {row.invalid}" for row in every if row.invalid]:
        raise RuntimeError(f"not evidence, the machine was not idle or values were wrong: {'; '.join(bad)}")
    by_size = {world: {row.bytes: row.p50_ms / 1e3 for row in rows} for world, rows in sweeps.items()}
    link = fit("all_reduce", 2, by_size[2])
    off = [abs(error) for world in (3, 4) for error in errors(link, world, by_size[world])]
    lines = []
    for world, rows in sweeps.items():
        for row in rows:
            predicted = 1e3 * predict("all_reduce", world, row.bytes, link.alpha, link.beta)
            off_by = f"{predicted / row.p50_ms - 1:+.1%}"
            lines.append([str(world), f"{row.bytes:,}", f"{row.p50_ms:.1f}", f"{predicted:.1f}", off_by])
    checks = (
        *(
            at_least(f"bus bandwidth of a 16 MB all-reduce over 4 hosts at {name}, of the rate", row.of_link, 0.93)
            for name, row in rates.items()
        ),
        at_least(
            "bus bandwidth of our 16 MB all-to-all over 4 hosts at 100mbit, of the rate", scattered[1].of_link, 0.85
        ),
        Check("round trip with --latency 10ms", f"{trip:.2f} ms", "20 to 22 ms", 20 <= trip <= 22),
        at_most("all-reduce after `shape` from 1gbit to 100mbit, of before", change[1] / change[0], 0.12),
        at_most("median error of predicting n = 3 and 4 from n = 2", 100 * statistics.median(off), 10, " %"),
    )
    body = (
        "Links of `dtrain cluster`, all-reduce over gloo. With 50 mbit and 5 ms: "
        f"alpha {1e3 * link.alpha:.2f} ms, beta {8 / link.beta / 1e6:.1f} Mbit/s, fitted at two hosts alone; the "
        "times of three and four are predicted.\n\n"
        + table(["ranks", "bytes", "measured ms", "predicted ms", "off"], lines)
        + "\n\nAll-to-all of 16 MB over four hosts at 100 Mbit/s, by gloo (`all_to_all`) and on the channel, which "
        "posts every receive before any send:\n\n"
        + table(["", "ms", "of the rate"], [[r.op, f"{r.p50_ms:.0f}", f"{r.of_link:.2f}"] for r in scattered])
    )
    measured, links = "dtrain bench collectives launcher=slurm launcher.nodes=N bench.ops=", "dtrain cluster up"
    commands = (
        f"{links} --bandwidth 100mbit; {measured}{THEIRS},{OURS}",
        *(
            f"{links} {words}; {measured}all_reduce"
            for words in (
                "--bandwidth 100mbit",
                "--bandwidth 1gbit",
                "--latency 10ms",
                "--latency 5ms --bandwidth 50mbit",
            )
        ),
    )  # fmt: skip
    of_link = {name: row.of_link for name, row in rates.items()} | {row.op: row.of_link for row in scattered}
    figures: dict[str, object] = {
        "of_link": of_link, "change_mbit": list(change), "round_trip_ms": trip, "alpha": link.alpha,
        "beta": link.beta,
        "seconds": {str(world): {str(size): s for size, s in sizes.items()} for world, sizes in by_size.items()},
    }  # fmt: skip
    return Report("Links", body, commands, checks, figures)
