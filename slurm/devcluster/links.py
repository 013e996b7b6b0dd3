"""Network namespaces and what connects them: a bridge in a namespace of its own, veth pairs, and token buckets.

    host namespace            switch namespace
    eth0 (tbf out) -- veth -- port (tbf towards the host) -- bridge

Nothing of it is in the machine's own namespace, so nothing there filters it, and two clusters may have equal addresses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.slurm.devcluster.state import ClusterError, Rate

__all__ = ["PREFIX", "allow_cubic", "connect", "cut", "namespace", "namespaces", "remove", "restore_cubic", "shape"]

PREFIX = "dtrain"
ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
BURST_BYTES = 131072  # less, and 1 gbit is not reached; messages below it are not shaped
QUEUE_LATENCY = "50ms"


def namespace(cluster: str, host: str) -> str:
    """The name of a host's network namespace.

    >>> namespace("a", "c1")
    'dtrain-a-c1'
    """
    return f"{PREFIX}-{cluster}-{host}"


def namespaces(cluster: str) -> list[str]:
    """The namespaces of a cluster, in whatever state it is."""
    from pyroute2 import netns

    return sorted(name for name in netns.listnetns() if name.startswith(f"{PREFIX}-{cluster}-"))


def create(names: Sequence[str]) -> None:
    """Make namespaces, each with its loopback up."""
    from pyroute2 import NetNS, netns

    for name in names:
        netns.create(name)
        with NetNS(name) as inside:
            inside.link("set", index=inside.link_lookup(ifname="lo")[0], state="up")


def remove(cluster: str) -> None:
    """Remove a cluster's namespaces, and with them every link."""
    from pyroute2 import netns

    for name in namespaces(cluster):
        netns.remove(name)


def bridge(switch: str) -> None:
    """The bridge within the namespace ``switch``."""
    with _inside(switch) as inside:
        inside.link("add", ifname="bridge", kind="bridge")
        inside.link("set", index=_index(inside, "bridge"), state="up")


def connect(switch: str, host_namespace: str, host: str, address: str) -> None:
    """Join a host to the bridge: its end is called eth0, the port at the bridge as the host."""
    with _inside(switch) as inside:
        inside.link("add", ifname=host, kind="veth", peer={"ifname": "eth0", "net_ns_fd": host_namespace})
        port = _index(inside, host)
        inside.link("set", index=port, master=_index(inside, "bridge"), state="up")
    with _inside(host_namespace) as inside:
        eth0 = _index(inside, "eth0")
        inside.addr("add", index=eth0, address=address, prefixlen=24)
        inside.link("set", index=eth0, state="up")


def address(host_namespace: str, address: str) -> None:
    """Give a host's eth0, which is there already, its address."""
    with _inside(host_namespace) as inside:
        eth0 = _index(inside, "eth0")
        inside.addr("add", index=eth0, address=address, prefixlen=24)
        inside.link("set", index=eth0, mtu=1500, state="up")


def shape(switch: str, host_namespace: str, host: str, rate: Rate) -> None:
    """Give a host's link a rate, in both directions; it may carry traffic meanwhile."""
    for where, name in ((host_namespace, "eth0"), (switch, host)):
        with _inside(where) as inside:
            _tbf(inside, _index(inside, name), rate)


def _inside(namespace: str) -> Any:
    """An existing namespace: without flags, pyroute2 would create one of an unknown name."""
    from pyroute2 import NetNS, netns

    if namespace not in netns.listnetns():
        raise ClusterError(f"the network namespace {namespace} is gone; take the cluster down")
    return NetNS(namespace, flags=0)


def _index(inside: Any, name: str) -> int:
    indices: list[int] = inside.link_lookup(ifname=name)
    if not indices:
        raise ClusterError(f"the link {name} is gone; take the cluster down")
    return indices[0]


def _tbf(inside: Any, index: int, rate: Rate) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    if rate.bits is None:
        with contextlib.suppress(NetlinkError):  # it had none
            inside.tc("del", index=index, parent=0xFFFFFFFF)
        return
    burst = max(8192, min(BURST_BYTES, rate.bits // 8 // 50))  # 20 ms of a slow link
    inside.tc("replace", "tbf", index=index, handle=0x10000, parent=0xFFFFFFFF, rate=f"{rate.bits}bit", burst=burst,
              latency=QUEUE_LATENCY)  # fmt: skip


def cut(switch: str, host: str, *, up: bool) -> None:
    """Take a host's port at the bridge down, or up again."""
    with _inside(switch) as inside:
        inside.link("set", index=_index(inside, host), state="up" if up else "down")


def allow_cubic(keep: Path) -> None:
    """Let namespaces choose cubic, which keeps a shaped rate better than bbr; the old value goes to ``keep``."""
    allowed = ALLOWED.read_text().split()
    if "cubic" not in allowed:
        if not keep.exists():
            keep.write_text(" ".join(allowed))
        ALLOWED.write_text(" ".join([*allowed, "cubic"]))


def restore_cubic(keep: Path) -> None:
    """Put back what `allow_cubic` changed."""
    if keep.exists():
        ALLOWED.write_text(keep.read_text())
        keep.unlink()


def processes(names: Sequence[str]) -> list[int]:
    """Every process within these namespaces."""
    inodes = set()
    for name in names:
        with contextlib.suppress(OSError):
            inodes.add(os.stat(f"/run/netns/{name}").st_ino)
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/net").st_ino in inodes:
                    pids.append(int(entry))
    return pids
