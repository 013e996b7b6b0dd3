"""A switch in user space, for links with latency: ``python -m dtrain.slurm.devcluster.switch FOLDER``.

Every host's eth0 is a TUN device whose packets pass through this process: packet -> leaves the sender's link at its
rate -> enters the receiver's link at its rate -> is delivered after the latency. A host whose link is busy is not read
from, so its kernel holds the packets back as it does for a network card, and nothing is lost. The kernel here has no
netem. Segments of up to 64 KiB travel in one piece (TSO), which keeps the processor out of it up to about 1 gbit.

SIGHUP: read the rates, and which hosts are cut off, again from cluster.json.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.slurm.devcluster.links import namespace
from dtrain.slurm.devcluster.state import Facts

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02  # checksums, segmentation of TCP over IPv4
HEADER = 10  # of virtio, in front of each packet
LARGEST = HEADER + 65536 + 64
AHEAD_SECONDS = 0.002  # how far a link may be busy while its host is still read from
QUEUE_SECONDS = 1.0  # packets for a receiver whose link is busy for longer are lost


@dataclass
class Port:
    """One host's link. Times are those at which each direction has sent what it was given."""

    host: str
    tun: int
    bits: int | None
    cut: bool = False
    out_free: float = 0.0
    in_free: float = 0.0

    def seconds(self, size: int) -> float:
        return 8 * size / self.bits if self.bits else 0.0


def open_tun(net: str) -> int:
    """A TUN device called eth0 within a namespace, as a file descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    target = os.open(f"/run/netns/{net}", os.O_RDONLY)
    try:
        if libc.setns(target, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {net}")
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(tun, TUNSETOFFLOAD, OFFLOADS)
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(target)
    return tun


class Switch:
    """Carries packets between ports until it is ended."""

    def __init__(self, facts: Facts, ports: dict[str, Port]) -> None:
        self._latency = facts.latency_seconds
        self._ports = ports
        self._by_address = {socket.inet_aton(facts.addresses[host]): port for host, port in ports.items()}
        self._by_tun = {port.tun: port for port in ports.values()}
        self._flying: list[tuple[float, int, Port, bytes]] = []
        self._count = itertools.count()
        self._poll = select.epoll()
        self._paused: set[int] = set()
        for tun in self._by_tun:
            self._poll.register(tun, select.EPOLLIN)

    def configure(self, facts: Facts) -> None:
        """New rates, and who is cut off."""
        for host, port in self._ports.items():
            port.bits, port.cut = facts.rates[host], host in facts.cut

    def serve(self) -> None:
        """Serve for ever."""
        while True:
            for tun, _ in self._poll.poll(self._timeout()):
                self._read(self._by_tun[tun])
            now = time.monotonic()
            while self._flying and self._flying[0][0] <= now:
                _, _, port, packet = heapq.heappop(self._flying)
                if not port.cut:
                    self._deliver(port, packet)
            for tun in [tun for tun in self._paused if self._by_tun[tun].out_free <= now + AHEAD_SECONDS]:
                self._paused.discard(tun)
                self._poll.modify(tun, select.EPOLLIN)

    def _timeout(self) -> float | None:
        times = [self._by_tun[tun].out_free - AHEAD_SECONDS for tun in self._paused]
        if self._flying:
            times.append(self._flying[0][0])
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _read(self, port: Port) -> None:
        for _ in range(16):
            now = time.monotonic()
            if port.out_free > now + AHEAD_SECONDS:
                self._paused.add(port.tun)
                self._poll.modify(port.tun, 0)
                return
            try:
                packet = os.read(port.tun, LARGEST)
            except BlockingIOError:
                return
            if packet[HEADER] >> 4 != 4:
                continue  # IPv6's neighbour discovery
            target = self._by_address.get(packet[HEADER + 16 : HEADER + 20])
            if target is None or port.cut or target.cut:
                continue
            size = len(packet) - HEADER
            port.out_free = max(now, port.out_free) + port.seconds(size)
            # The receiver's link takes the bits as they arrive, unless it is slower or already busy.
            arrived = max(port.out_free, max(now, target.in_free) + target.seconds(size))
            if arrived - now > QUEUE_SECONDS + target.seconds(size):
                continue
            target.in_free = arrived
            heapq.heappush(self._flying, (arrived + self._latency, next(self._count), target, packet))

    def _deliver(self, port: Port, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # the host is going away
            os.write(port.tun, packet)


def main(folder: Path) -> None:
    """Serve the cluster whose files are in ``folder``."""
    facts = Facts.read(folder.name)
    tuns = {host: open_tun(namespace(facts.name, host)) for host in facts.addresses}
    switch = Switch(facts, {host: Port(host, tun, facts.rates[host], host in facts.cut) for host, tun in tuns.items()})
    signal.signal(signal.SIGHUP, lambda *_: switch.configure(Facts.read(folder.name)))
    ready = folder / "switch.ready.new"
    ready.write_text(str(os.getpid()))
    ready.rename(folder / "switch.ready")
    switch.serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
