"""A torch ``Store`` over `dtrain.comm.runtime.membership.store_server`, for gloo groups and `Members`."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from dtrain.comm.runtime.membership.sealed_messages import Mistrust, Sealed, opened
from dtrain.comm.torch_private import Store

__all__ = ["GuardedStore", "Line"]

OPEN_SECONDS = 20.0


class Line:
    """A connection to the store, for one request at a time from any thread. A failure closes it.

    Raises ``ConnectionError`` if no server answers, or one with another secret.
    """

    def __init__(self, host: str, port: int, secret: bytes, seconds: float) -> None:
        self._lock, self._where = threading.Lock(), f"{host}:{port}"
        connection = socket.create_connection((host, port), timeout=min(OPEN_SECONDS, seconds))
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._sealed: Sealed | None = opened(connection, secret)
            self.local: str = connection.getsockname()[0]
            connection.settimeout(seconds)
        except BaseException:
            connection.close()
            raise

    def ask(self, *fields: bytes) -> list[bytes]:
        """The answer to one request.

        Raises ``DistNetworkError`` if the connection is lost, and ``DistStoreError`` for what the store refuses.
        """
        with self._lock:
            if self._sealed is None:
                raise dist.DistNetworkError(f"the connection to the store at {self._where} was lost")
            try:
                self._sealed.send(*fields)
                status, *answer = self._sealed.receive()
            except (OSError, EOFError, Mistrust) as error:
                self._close()
                raise dist.DistNetworkError(f"the store at {self._where} answers no more ({error})") from error
            except BaseException:  # a late answer would be taken for that of the next request
                self._close()
                raise
        if status != b"ok":
            raise dist.DistStoreError(f"the store at {self._where}: {b' '.join(answer).decode(errors='replace')}")
        return answer

    def close(self) -> None:
        """Later requests raise ``DistNetworkError``."""
        with self._lock:
            self._close()

    def __del__(self) -> None:
        if hasattr(self, "_sealed"):
            self._close()

    def _close(self) -> None:
        if self._sealed is not None:
            with contextlib.suppress(OSError):
                self._sealed.socket.close()
        self._sealed = None


class GuardedStore(Store):
    """The keys below ``prefix``. Stores may share a line; keep one as long as torch may use it."""

    def __init__(self, line: Line, prefix: str, timeout: timedelta) -> None:
        super().__init__()
        self._line, self._prefix = line, prefix
        self.set_timeout(timeout)

    @property
    def line(self) -> Line:
        return self._line

    def below(self, prefix: str, timeout: timedelta) -> GuardedStore:
        """The keys below a prefix of these."""
        return GuardedStore(self._line, f"{self._prefix}{prefix}/", timeout)

    # ---- methods of torch's stores -----------------------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        self._line.ask(b"set", self._key(key), _bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        value = self.look(key)
        if value is None:
            raise dist.DistStoreError(f"the store has lost {key}")
        return value

    def add(self, key: str, value: int) -> int:
        return int(self._line.ask(b"add", self._key(key), b"%d" % value)[0])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._line.ask(b"compare_set", self._key(key), _bytes(expected), _bytes(desired))[0]

    def check(self, keys: Sequence[str]) -> bool:
        return self._line.ask(b"check", *map(self._key, keys))[0] == b"yes"

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        if timeout is None:
            timeout = cast(timedelta, getattr(self, "timeout"))  # noqa: B009  # torch's stubs do not know it
        seconds = timeout.total_seconds()
        deadline, wanted = time.monotonic() + seconds, [self._key(key) for key in keys]
        while True:
            left = deadline - time.monotonic()
            if self._line.ask(b"wait", b"%d" % max(0, int(1000 * left)), *wanted)[0] == b"yes":
                return
            if left <= 0:
                raise dist.DistStoreError(f"nobody has set {', '.join(keys)} for {seconds:g} s")

    def delete_key(self, key: str) -> bool:
        return self._line.ask(b"delete", self._key(key))[0] == b"yes"

    def num_keys(self) -> int:
        return int(self._line.ask(b"count")[0])

    def has_extended_api(self) -> bool:
        return False

    # ---- further methods ---------------------------------------------------------------------------------------------

    def look(self, key: str) -> bytes | None:
        """The value, or None; does not wait."""
        values = self._line.ask(b"look", self._key(key))
        return values[0] if values else None

    def under(self, prefix: str) -> dict[str, bytes]:
        """All keys that begin with ``prefix``, without it, and their values."""
        start = self._key(prefix)
        fields = self._line.ask(b"under", start)
        return {k[len(start) :].decode(): v for k, v in zip(fields[::2], fields[1::2], strict=True)}

    def _key(self, key: str) -> bytes:
        return f"{self._prefix}{key}".encode()


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
