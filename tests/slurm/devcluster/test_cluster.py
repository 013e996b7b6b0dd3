"""Real clusters: namespaces, links, Slurm's daemons; and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import NetNS, netns

from dtrain.slurm.devcluster import Cluster, ClusterError, devcluster, down, links, state, up
from dtrain.slurm.devcluster.cluster import CUBIC
from dtrain.slurm.devcluster.links import ALLOWED, namespace, namespaces

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(120)]

# Connects, then tells how long a byte takes there and back: the median of 15, in milliseconds.
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
        for _ in range(15):
            started = time.perf_counter()
            connection.send(b"x")
            assert connection.recv(1) == b"x"
            times.append(1000 * (time.perf_counter() - started))
        print(statistics.median(times))
"""


def traces(*names: str) -> dict[str, Any]:
    """What clusters of these names could leave on a machine, of which there must be nothing. Others may be up."""
    folders = [f"{state.ROOT}/{name}" for name in names]
    # In a process's mounts, /run may be a file system of its own.
    within = [f"{state.ROOT.name}/{name}/" for name in names]
    return {
        "namespaces": [space for name in names for space in namespaces(name)],
        "mounts": [line for line in Path("/proc/mounts").read_text().splitlines() if _mentions(line, names)],
        "processes": [pid for pid in os.listdir("/proc") if pid.isdigit() and _belongs(pid, folders, within)],
        "files": [folder for folder in folders if Path(folder).exists()],
        "/run/munge": Path("/run/munge").exists() and not MUNGE,
        # What it was before the first of all clusters that are up now.
        "congestion control": (KEPT if KEPT.exists() else ALLOWED).read_text().split() != SETTING,
    }


KEPT = state.ROOT / CUBIC
SETTING = (KEPT if KEPT.exists() else ALLOWED).read_text().split()
MUNGE = Path("/run/munge").exists()
NOTHING = {
    "namespaces": [], "mounts": [], "processes": [], "files": [], "/run/munge": False, "congestion control": False,
}  # fmt: skip


def _mentions(line: str, names: tuple[str, ...]) -> bool:
    return any(f"/{links.PREFIX}-{name}-" in line or f"{state.ROOT}/{name}/" in line for name in names)


def _belongs(pid: str, folders: list[str], within: list[str]) -> bool:
    """Whether a process was given a cluster's files, or sees its /etc/hosts: daemons, jobs, whoever holds a host."""
    try:
        arguments, mounts = Path(f"/proc/{pid}/cmdline").read_text(), Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:  # it has just ended
        return False
    daemon = any(f"{folder}/" in arguments or f"{folder}\0" in arguments for folder in folders)
    return daemon or any(part in mounts for part in within)


def round_trip(cluster: Cluster, one: str, other: str) -> float:
    server = subprocess.Popen(
        [
            "nsenter",
            "--target",
            str(cluster.facts.pids[other]),
            "--net",
            "--",
            sys.executable,
            "-c",
            ROUND_TRIP,
            "serve",
        ]
    )
    with server:
        time.sleep(0.5)
        return float(cluster.run([sys.executable, "-c", ROUND_TRIP, other], host=one).stdout)


def rate(cluster: Cluster, host: str) -> int:
    """What the token bucket of a host's own end lets through, in bits per second."""
    with NetNS(namespace(cluster.facts.name, host)) as inside:
        (bucket,) = (q for q in inside.get_qdiscs() if q.get_attr("TCA_KIND") == "tbf")
        found: int = bucket.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")["rate"]
    return 8 * found


def test_two_clusters_side_by_side_with_slurm_names_and_links_of_their_own() -> None:
    with devcluster(nodes=2, bandwidth="100mbit", name="one") as one, devcluster(nodes=3, name="two") as two:
        assert sorted(one.run(["srun", "-N2", "hostname"]).stdout.split()) == ["c1", "c2"]
        assert sorted(two.run(["srun", "-N3", "hostname"]).stdout.split()) == ["c1", "c2", "c3"]
        assert one.run(["hostname"]).stdout == "login\n" and one.run(["hostname"], host="c2").stdout == "c2\n"
        assert two.run(["getent", "hosts", "10.66.0.3"]).stdout.split() == ["10.66.0.3", "c3"]
        assert one.run(["getent", "hosts", "c3"], check=False).returncode == 2
        assert one.run(["pwd"]).stdout.strip() == os.getcwd()
        assert one.run(["cat", "/proc/sys/net/ipv4/tcp_congestion_control"], host="c1").stdout == "cubic\n"
        assert (rate(one, "c1"), rate(two, "c1")) == (100_000_000, 1_000_000_000)
        one.shape("20mbit", "c2")
        assert (rate(one, "c1"), rate(one, "c2")) == (100_000_000, 20_000_000)
        one.cut("c2")
        ping = ["sh", "-c", "timeout 1 sh -c 'echo > /dev/tcp/c2/6818' || exit 1"]
        assert one.run(["bash", "-c", ping[2].replace("sh -c 'echo", "bash -c 'echo")], check=False).returncode == 1
        one.heal("c2")
        assert one.run(["bash", "-c", "echo > /dev/tcp/c2/6818"], check=False).returncode == 0
        with pytest.raises(ClusterError, match="has no host c9"):
            one.cut("c9")
        with pytest.raises(ClusterError, match="cluster one is up"):
            up(name="one")
    assert traces("one", "two") == NOTHING


def test_latency_is_one_way_and_rates_change_while_it_is_up() -> None:
    with devcluster(nodes=2, bandwidth="50mbit", latency="10ms", name="late") as cluster:
        # There and back is twice the latency; how much more is the machine's own time, which is not asserted on.
        assert round_trip(cluster, "c1", "c2") >= 20
        cluster.shape("none")
        assert sorted(cluster.run(["srun", "-N2", "hostname"]).stdout.split()) == ["c1", "c2"]
        cluster.cut("c1")
        assert cluster.run(["timeout", "1", "bash", "-c", "echo > /dev/tcp/c1/6818"], check=False).returncode
    assert traces("late") == NOTHING


def test_eight_hosts_come_and_go_without_a_trace() -> None:
    with devcluster(nodes=8, bandwidth="100mbit", name="eight") as cluster:
        assert len(cluster.run(["srun", "-N8", "hostname"]).stdout.split()) == 8
        there = traces("eight")
        assert len(there["namespaces"]) == 10 and len(there["processes"]) >= 9 + 9 + 1 and there["files"]
        assert not any(traces("eigh").values())
    assert traces("eight") == NOTHING


def test_a_killed_cluster_is_taken_down_to_the_last_trace() -> None:
    facts = up(nodes=2, name="killed")
    for number in (int((facts.folder / name).read_text()) for name in ("slurmctld.pid", "munged.pid", "c1.pid")):
        os.kill(number, signal.SIGKILL)
    down("killed")
    assert traces("killed") == NOTHING


def test_a_cluster_whose_block_was_killed_makes_room_for_the_next_of_its_name() -> None:
    program = """
from dtrain.slurm.devcluster import devcluster
with devcluster(nodes=2, name="orphan"):
    print("up", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
        with pytest.raises(ClusterError, match="cluster orphan is up"):
            up(name="orphan")
        owner.kill()
    with devcluster(nodes=1, name="orphan") as cluster:
        assert cluster.run(["srun", "hostname"]).stdout == "c1\n"
    assert traces("orphan") == NOTHING


def test_an_up_that_is_killed_half_way_is_taken_down_to_the_last_trace() -> None:
    starting = subprocess.Popen([sys.executable, "-m", "dtrain", "cluster", "up", "--nodes", "6", "--name", "half"])
    with starting:
        deadline = time.monotonic() + 30
        while namespace("half", "c3") not in netns.listnetns():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        starting.kill()
    with pytest.raises(ClusterError, match="left something behind: dtrain cluster down --name half"):
        up(name="half")
    down("half")
    assert traces("half") == NOTHING


def test_an_up_that_fails_takes_down_what_it_made_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dtrain.slurm.devcluster.daemons.slurm_conf",
        lambda *_, **__: "ClusterName=x\nNoSuchKey=1\nSlurmctldHost=login\n",
    )
    with pytest.raises(ClusterError, match=r"slurmctld did not start: .*NoSuchKey"):
        up(nodes=1, name="wrong")
    assert traces("wrong") == NOTHING
