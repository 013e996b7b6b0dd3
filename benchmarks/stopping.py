"""The report on stopping: how soon a signal is seen by ranks that all sit in a collective over a slow link."""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from pathlib import Path

from benchmarks.harness import Session, say
from benchmarks.page import Report, at_most, table
from dtrain.slurm.devcluster import Cluster, devcluster
from tests.programs.hosts import CLUSTER

RANKS = 4
# 4.2 MB of gradients for each rank and step: half a minute over this link.
BANDWIDTH = "1mbit"
JOB = (
    "train", "launcher=slurm", f"launcher.nodes={RANKS}", f"launcher.workers={RANKS}", f"mesh.replicate={RANKS}",
    "mesh.shard=1", "engine=ddp", "sync=dense", "train.evaluation_examples=0", "launcher.hang_seconds=0",
)  # fmt: skip
SEEN = re.compile(r"^(\S+ \S+) SIGTERM: stopping at the next agreed step$", re.MULTILINE)


def stopping(session: Session) -> Report:
    """Three runs on a cluster of four hosts; each is signalled while every rank waits in a collective."""
    delays: list[list[float]] = []
    waiting: list[str] = []
    with devcluster(nodes=RANKS, bandwidth=BANDWIDTH, name=CLUSTER) as cluster:
        for _ in range(3):
            folder = session.folder / f"signalled-{next(session.numbers)}"
            sent, where = signalled(cluster, folder)
            delays.append([seen - sent for seen in seen_at(folder)])
            waiting.append(where)
    return stopping_report(delays, waiting)


def signalled(cluster: Cluster, folder: Path) -> tuple[float, str]:
    """When the signal was sent, and the collective that rank 0 sat in."""
    say("dtrain " + " ".join(JOB))
    cluster.run([sys.executable, "-m", "dtrain", *JOB, f"run.dir={folder}"], seconds=120)
    job = json.loads((folder / "job.json").read_text())["id"]
    try:
        where = wait_until_all_wait(folder)
        sent = time.time()
        cluster.run(["scancel", "--signal=TERM", job])
        deadline = time.monotonic() + 30
        while len(seen_at(folder)) < RANKS and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        cluster.run(["scancel", "--signal=KILL", "--full", job], check=False)
        cluster.run(["scancel", job], check=False)
    return sent, where


def wait_until_all_wait(folder: Path) -> str:
    """Return the name of the collective when the heartbeat of every rank says that it waits in the same one."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        time.sleep(0.5)
        beats = [path.read_text() for path in (folder / "ranks").glob("rank-*.beat")]
        waits = [(json.loads(beat).get("waiting") or {}).get("what") for beat in beats]
        if len(waits) == RANKS and waits[0] and len(set(waits)) == 1:
            return str(waits[0])
    raise RuntimeError(f"the ranks of {folder} never sat in one collective together")


def seen_at(folder: Path) -> list[float]:
    """When each rank that has seen the signal so far wrote that it had."""
    logs = sorted((folder / "logs").glob("rank-*.log"))
    matches = [SEEN.search(log.read_text()) for log in logs]
    return [datetime.datetime.fromisoformat(match[1]).astimezone().timestamp() for match in matches if match]


def stopping_report(delays: list[list[float]], waiting: list[str]) -> Report:
    """Seconds from the command that sends the signal to each rank's note of it, run by run."""
    rows = [
        [str(number + 1), where, ", ".join(f"{1e3 * delay:.0f}" for delay in sorted(run))]
        for number, (run, where) in enumerate(zip(delays, waiting, strict=True))
    ]
    body = (
        f"Four hosts of `dtrain cluster` with {BANDWIDTH} each; every step's collectives take half a minute. "
        "`scancel --signal=TERM` is called when the heartbeats of all ranks say that they wait in the same collective. "
        "Counted from before that command to each rank's own note: Slurm's part is in it.\n\n"
        + table(["run", "all ranks waited in", "seen by each rank after, ms"], rows)
    )
    every = [delay for run in delays for delay in run]
    checks = (
        at_most("ranks that did not see it", RANKS * len(delays) - len(every), 0),
        at_most("slowest rank, seconds", max(every, default=float("inf")), 1.0),
    )
    commands = (
        f"dtrain cluster up --nodes 4 --bandwidth {BANDWIDTH}",
        "dtrain " + " ".join(JOB),
        "scancel --signal=TERM JOB",
    )
    return Report("Stopping", body, commands, checks, {"seconds": delays})
