"""The store at which replicas meet, as one process serves it: for those who know the secret, and for nobody else.

A request is [what, arguments...], its answer [b"ok", ...] or [b"error", text], as `sealed_messages` carries them. Who
connects and proves nothing in time is cut off; the longest waiting goes first where there are many. Each connection has
a thread; a request waits a second at most, so that a client that has gone leaves none behind.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping

from dtrain.comm.runtime.membership.sealed_messages import Mistrust, Sealed, answered

__all__ = ["StoreServer"]

log = logging.getLogger(__name__)

PROOF_SECONDS, WAIT_SECONDS, LOOK_SECONDS = 5.0, 1.0, 0.5
STRANGERS = 64
"""Connections that have proved nothing yet."""
SAY_EVERY_SECONDS = 60.0
MOST_BYTES = 1 << 28
"""Of all that is kept."""


class StoreServer:
    """Served until `close`, or as long as the process lives. ``port``: where, if it was 0.

    Raises ``OSError`` if it cannot listen there.
    """

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self._secret, self._data, self._changed = secret, _Data(), threading.Condition()
        self._strangers: dict[socket.socket, float] = {}  # since when, the longest first
        self._known: set[socket.socket] = set()
        self._lock, self._told_at, self._turned_away = threading.Lock(), -SAY_EVERY_SECONDS, 0
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener.settimeout(LOOK_SECONDS)
        self.host, self.port, self._closed = host, int(self._listener.getsockname()[1]), False
        own = weakref.ref(self)  # the thread ends when nobody holds the server any more
        threading.Thread(target=_accept, args=(own, self._listener), name="dtrain-members-store", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        with self._lock:
            self._closed = True
            for one in (*self._strangers, *self._known):
                _end(one)
        _end(self._listener)

    # ---- connections -------------------------------------------------------------------------------------------------

    def take(self, connection: socket.socket | None) -> bool:
        """Serve one who has come, and cut those off who have proved nothing for too long. False when it is closed."""
        now = time.monotonic()
        with self._lock:
            if connection is not None:
                self._strangers[connection] = now
            crowd = len(self._strangers) - STRANGERS
            for number, (one, since) in enumerate(self._strangers.items()):
                if number < crowd or now - since > PROOF_SECONDS:
                    _end(one)
            if self._closed:
                return False
        if connection is not None:
            try:
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except RuntimeError:  # no thread is left
                self._forget(connection)
        return True

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sealed = self._proved(connection)
            if sealed is not None:
                self._answer(sealed)
        except (OSError, EOFError):
            pass  # it has gone
        finally:
            self._forget(connection)

    def _proved(self, connection: socket.socket) -> Sealed | None:
        """The connection of one who knows the secret; None for anybody else."""
        try:
            sealed = answered(connection, self._secret)
        except Mistrust as reason:
            self._turn_away(reason)
            return None
        with self._lock:
            self._strangers.pop(connection, None)
            self._known.add(connection)
        return sealed

    def _turn_away(self, reason: Exception) -> None:
        with self._lock:
            self._turned_away += 1
            if time.monotonic() - self._told_at < SAY_EVERY_SECONDS:
                return
            self._told_at = time.monotonic()
        log.warning("a connection was turned away (%s), the %d. so far", reason, self._turned_away)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(connection, None)
            self._known.discard(connection)
        connection.close()

    def _answer(self, sealed: Sealed) -> None:
        while True:
            try:
                fields = sealed.receive()
            except Mistrust as reason:
                self._turn_away(reason)
                return
            try:
                what, *arguments = fields
                found = self._requests[what](self, arguments)
            except (KeyError, ValueError, IndexError) as error:
                sealed.send(b"error", f"{error}".encode())
            else:
                sealed.send(b"ok", *found)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _set(self, given: list[bytes]) -> list[bytes]:
        key, value = given
        with self._changed:
            self._data.put(key, value)
            self._changed.notify_all()
        return []

    def _look(self, given: list[bytes]) -> list[bytes]:
        (key,) = given
        with self._changed:
            return [self._data[key]] if key in self._data else []

    def _under(self, given: list[bytes]) -> list[bytes]:
        """Keys and values by turns."""
        (prefix,) = given
        with self._changed:
            return [part for key, value in self._data.items() if key.startswith(prefix) for part in (key, value)]

    def _compare_set(self, given: list[bytes]) -> list[bytes]:
        """As torch's stores: what is missing is taken for empty."""
        key, expected, desired = given
        with self._changed:
            there = self._data.get(key)
            if there is None and expected:
                return [expected]
            if there is not None and there != expected:
                return [there]
            self._data.put(key, desired)
            self._changed.notify_all()
        return [desired]

    def _add(self, given: list[bytes]) -> list[bytes]:
        key, amount = given
        with self._changed:
            total = b"%d" % (int(self._data.get(key, b"0")) + int(amount))
            self._data.put(key, total)
            self._changed.notify_all()
        return [total]

    def _check(self, keys: list[bytes]) -> list[bytes]:
        with self._changed:
            return [b"yes" if all(key in self._data for key in keys) else b"no"]

    def _wait(self, given: list[bytes]) -> list[bytes]:
        milliseconds, *keys = given
        with self._changed:
            seconds = min(WAIT_SECONDS, int(milliseconds) / 1000)
            there = self._changed.wait_for(lambda: all(key in self._data for key in keys), seconds)
        return [b"yes" if there else b"no"]

    def _delete(self, given: list[bytes]) -> list[bytes]:
        (key,) = given
        with self._changed:
            return [b"yes" if self._data.drop(key) else b"no"]

    def _count(self, given: list[bytes]) -> list[bytes]:
        with self._changed:
            return [b"%d" % len(self._data)]

    _requests: Mapping[bytes, Callable[[StoreServer, list[bytes]], list[bytes]]] = {
        b"set": _set, b"look": _look, b"under": _under, b"compare_set": _compare_set, b"add": _add, b"check": _check,
        b"wait": _wait, b"delete": _delete, b"count": _count,
    }  # fmt: skip


class _Data(dict[bytes, bytes]):
    """What is kept, up to a size."""

    def __init__(self) -> None:
        self._size = 0

    def put(self, key: bytes, value: bytes) -> None:
        more = len(value) - len(self[key]) if key in self else len(key) + len(value)
        if self._size + more > MOST_BYTES:
            raise ValueError(f"the store is full: it keeps {MOST_BYTES} bytes")
        self._size += more
        self[key] = value

    def drop(self, key: bytes) -> bool:
        value = self.pop(key, None)
        self._size -= len(key) + len(value) if value is not None else 0
        return value is not None


def _accept(of: weakref.ref[StoreServer], listener: socket.socket) -> None:
    with listener:
        while True:
            connection = None
            try:
                connection, _ = listener.accept()
                connection.setblocking(True)
            except TimeoutError:
                pass
            except OSError:
                time.sleep(LOOK_SECONDS / 10)  # no descriptor is left, until a stranger is cut off; or it is closed
            server = of()
            if server is None or not server.take(connection):
                return
            del server


def _end(connection: socket.socket) -> None:
    """Wake whoever reads from it, who closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
