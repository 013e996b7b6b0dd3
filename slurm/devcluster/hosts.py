"""Hosts: a network namespace each, with its own name, /etc/hosts and name service, held open by a process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.slurm.devcluster.state import ClusterError

__all__ = ["enter", "hold", "hosts_file", "spawn", "wait_for"]

# `ip netns exec` would remount /sys, and slurmd then finds no cgroups. Names must be found in the file alone: with a
# name server in between, every connection would wait for a reverse look-up.
HOLD = """
hostname "$1"
echo cubic > /proc/sys/net/ipv4/tcp_congestion_control
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
[ -e /etc/resolv.conf ] && mount --bind "$2/resolv.conf" "$(readlink -f /etc/resolv.conf)"
echo $$ > "$2/$1.pid.new" && mv "$2/$1.pid.new" "$2/$1.pid"
exec sleep infinity
"""
SECONDS = 10.0


def hosts_file(addresses: Mapping[str, str]) -> str:
    """The text of /etc/hosts.

    >>> print(hosts_file({"c1": "10.0.0.1"}), end="")
    127.0.0.1 localhost
    10.0.0.1 c1
    """
    return "".join(f"{address} {host}\n" for host, address in {"localhost": "127.0.0.1", **addresses}.items())


def hold(namespace: str, host: str, folder: Path) -> int:
    """Start the process that holds a host open; returns its process id."""
    pid_file = folder / f"{host}.pid"
    command = ["nsenter", f"--net=/run/netns/{namespace}", "unshare", "--uts", "--mount", "--propagation", "private"]
    spawn([*command, "sh", "-eu", "-c", HOLD, "sh", host, str(folder)], folder / f"{host}.log")
    wait_for(pid_file, folder / f"{host}.log", f"host {host}")
    return int(pid_file.read_text())


def spawn(command: Sequence[str], log: Path) -> None:
    """Start a detached process: it outlives this one, and is no child of it."""
    with log.open("ab") as output:
        subprocess.run(
            ["setsid", "--fork", *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True
        )


def wait_for(path: Path, log: Path, what: str) -> None:
    """Return when ``path`` exists. Raises ``ClusterError`` with the end of the log."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        output = log.read_text(errors="replace").strip()
        if output or time.monotonic() > deadline:
            raise ClusterError(f"{what} did not start: {output[-500:] or 'no word from it'}")
        time.sleep(0.01)


def enter(pid: int, argv: Sequence[str], *, directory: str | None = None) -> list[str]:
    """The command line that runs ``argv`` on the host of process ``pid``, in ``directory`` or the current one."""
    where = directory or os.getcwd()
    return ["nsenter", "--target", str(pid), "--net", "--uts", "--mount", f"--wd={where}", "--", *argv]
