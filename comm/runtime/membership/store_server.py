"""The server of the members' store; it serves only clients that know the secret.

A request is [name, arguments...], its answer [b"ok", ...] or [b"error", text], as `sealed_messages` carries them. A
connection that does not authenticate in time is closed; where there are too many, the oldest are. Each connection has a
thread; a request waits a second at most, so that a client that has gone leaves no thread behind.
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
"""The most connections that have not authenticated."""
WARN_EVERY_SECONDS = 60.0
MOST_BYTES = 1 << 28
"""The most bytes of all keys and values."""


class StoreServer:
    """Serves until `close`, or while the object lives. ``port``: the one it listens at, also where 0 was given.

    Raises ``OSError`` if it cannot listen there.
    """

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self._secret, self._data, self._changed = secret, _Data(), threading.Condition()
        self._strangers: dict[socket.socket, float] = {}  # connected at, oldest first
        self._known: set[socket.socket] = set()
        self._lock, self._warned_at, self._turned_away = threading.Lock(), -WARN_EVERY_SECONDS, 0
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener.settimeout(LOOK_SECONDS)
        self.host, self.port, self._closed = host, int(self._listener.getsockname()[1]), False
        weak = weakref.ref(self)  # the thread ends with the last reference to the server
        threading.Thread(target=_accept, args=(weak, self._listener), name="dtrain-members-store", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        with self._lock:
            self._closed = True
            for connection in (*self._strangers, *self._known):
                _end(connection)
        _end(self._listener)

    # ---- connections -------------------------------------------------------------------------------------------------

    def take(self, connection: socket.socket | None) -> bool:
        """Serve a new connection, and close those that are late to authenticate. False once the server is closed."""
        now = time.monotonic()
        with self._lock:
            if connection is not None:
                self._strangers[connection] = now
            crowd = len(self._strangers) - STRANGERS
            for number, (stranger, since) in enumerate(self._strangers.items()):
                if number < crowd or now - since > PROOF_SECONDS:
                    _end(stranger)
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
        """The authenticated connection; None for a client without the secret."""
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
            if time.monotonic() - self._warned_at < WARN_EVERY_SECONDS:
                return
            self._warned_at = time.monotonic()
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
                name, *arguments = fields
                reply = self._requests[name](self, arguments)
            except (KeyError, ValueError, IndexError) as error:
                sealed.send(b"error", f"{error}".encode())
            else:
                sealed.send(b"ok", *reply)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _set(self, arguments: list[bytes]) -> list[bytes]:
        key, value = arguments
        with self._changed:
            self._data.put(key, value)
            self._changed.notify_all()
        return []

    def _look(self, arguments: list[bytes]) -> list[bytes]:
        (key,) = arguments
        with self._changed:
            return [self._data[key]] if key in self._data else []

    def _under(self, arguments: list[bytes]) -> list[bytes]:
        """Keys that begin with ``prefix``, each followed by its value."""
        (prefix,) = arguments
        with self._changed:
            return [field for pair in self._data.items() if pair[0].startswith(prefix) for field in pair]

    def _compare_set(self, arguments: list[bytes]) -> list[bytes]:
        """As torch's stores do: a missing key equals an empty value."""
        key, expected, desired = arguments
        with self._changed:
            present = self._data.get(key)
            if present is None and expected:
                return [expected]
            if present is not None and present != expected:
                return [present]
            self._data.put(key, desired)
            self._changed.notify_all()
        return [desired]

    def _add(self, arguments: list[bytes]) -> list[bytes]:
        key, amount = arguments
        with self._changed:
            total = b"%d" % (int(self._data.get(key, b"0")) + int(amount))
            self._data.put(key, total)
            self._changed.notify_all()
        return [total]

    def _check(self, keys: list[bytes]) -> list[bytes]:
        with self._changed:
            return [b"yes" if all(key in self._data for key in keys) else b"no"]

    def _wait(self, arguments: list[bytes]) -> list[bytes]:
        milliseconds, *keys = arguments
        with self._changed:
            seconds = min(WAIT_SECONDS, int(milliseconds) / 1000)
            complete = self._changed.wait_for(lambda: all(key in self._data for key in keys), seconds)
        return [b"yes" if complete else b"no"]

    def _delete(self, arguments: list[bytes]) -> list[bytes]:
        (key,) = arguments
        with self._changed:
            return [b"yes" if self._data.drop(key) else b"no"]

    def _count(self, arguments: list[bytes]) -> list[bytes]:
        with self._changed:
            return [b"%d" % len(self._data)]

    _requests: Mapping[bytes, Callable[[StoreServer, list[bytes]], list[bytes]]] = {
        b"set": _set, b"look": _look, b"under": _under, b"compare_set": _compare_set, b"add": _add, b"check": _check,
        b"wait": _wait, b"delete": _delete, b"count": _count,
    }  # fmt: skip


class _Data(dict[bytes, bytes]):
    """Keys and values, of a bounded size in all."""

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


def _accept(reference: weakref.ref[StoreServer], listener: socket.socket) -> None:
    with listener:
        while True:
            connection = None
            try:
                connection, _ = listener.accept()
                connection.setblocking(True)
            except TimeoutError:
                pass
            except OSError:
                time.sleep(LOOK_SECONDS / 10)  # closed, or out of descriptors until a stranger is cut off
            server = reference()
            if server is None or not server.take(connection):
                return
            del server


def _end(connection: socket.socket) -> None:
    """Wake the thread that reads from it, which closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
