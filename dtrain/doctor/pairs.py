"""Every pair of hosts, in rounds of disjoint pairs: latency, bandwidth and clock skew.

Plain sockets with time limits, so that a dead link is a finding and not a hang.
"""

from __future__ import annotations

import socket
import statistics
import struct
import threading
import time
from dataclasses import dataclass

__all__ = ["Exchange", "Server", "exchange", "rounds"]

SECONDS = 5.0
TRIPS = 9
BLOCK = 1 << 18
FIRST_BYTES, MOST_BYTES = 1 << 19, 1 << 26
SEND_SECONDS = 0.5


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """A round-robin tournament: each pair once, and nobody twice in a round.

    >>> rounds(4)
    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    players: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    half, schedule = len(players) // 2, []
    for _ in range(len(players) - 1):
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        schedule.append(sorted((min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None))
        players = [players[0], players[-1], *players[1:-1]]
    return schedule


@dataclass(frozen=True)
class Exchange:
    """What one host measured with another. ``skew_seconds``: the other's clock less its own. ``error``: why not."""

    peer: int
    latency_ms: float = 0.0
    mbit: float = 0.0
    skew_seconds: float = 0.0
    error: str = ""


class Server:
    """Answers `exchange` until it is closed: one connection at a time."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="dtrain-doctor", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with connection:
                connection.settimeout(SECONDS)
                try:
                    self._answer(connection)
                except OSError:
                    continue  # the other side reports what was wrong

    def _answer(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(TRIPS):
            if not connection.recv(1):
                return
            connection.sendall(struct.pack("d", time.time()))
        while left := struct.unpack("Q", _exactly(connection, 8))[0]:
            while left:
                received = len(connection.recv(min(left, BLOCK)))
                if not received:
                    return
                left -= received
            connection.sendall(b"k")

    def close(self) -> None:
        """Stop answering."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(SECONDS)


def exchange(peer: int, address: str, port: int) -> Exchange:
    """Measure with the host that serves there."""
    try:
        with socket.create_connection((address, port), timeout=SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips, skews = [], []
            for _ in range(TRIPS):
                before, started = time.time(), time.perf_counter()
                connection.sendall(b"x")
                (theirs,) = struct.unpack("d", _exactly(connection, 8))
                trips.append(time.perf_counter() - started)
                skews.append(theirs - before - trips[-1] / 2)
            mbit = _bandwidth(connection)
    except OSError as error:
        return Exchange(peer, error=f"{address}:{port}: {error}")
    return Exchange(peer, 1e3 * statistics.median(trips) / 2, mbit, statistics.median(skews))


def _bandwidth(connection: socket.socket) -> float:
    """Mbit/s, from a transfer of about SEND_SECONDS, whose size a small first one determines."""
    rate = _rate(connection, FIRST_BYTES)
    enough = int(min(MOST_BYTES, max(FIRST_BYTES, rate * SEND_SECONDS)))
    rate = _rate(connection, enough)
    connection.sendall(struct.pack("Q", 0))
    return 8 * rate / 1e6


def _rate(connection: socket.socket, count: int) -> float:
    """Bytes per second of sending ``count``, until the other side acknowledges them."""
    block = bytes(BLOCK)
    started = time.perf_counter()
    connection.sendall(struct.pack("Q", count))
    for sent in range(0, count, BLOCK):
        connection.sendall(block[: count - sent])
    _exactly(connection, 1)
    return count / (time.perf_counter() - started)


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = connection.recv(count - len(received))
        if not chunk:
            raise OSError("the other side has closed the connection")
        received += chunk
    return received
