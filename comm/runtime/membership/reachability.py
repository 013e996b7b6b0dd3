"""Waits for a server to listen at an address, before torch does, whose wait is long and silent."""

from __future__ import annotations

import logging
import socket
import time

log = logging.getLogger(__name__)

WARN_AFTER_SECONDS, AGAIN_SECONDS = 5.0, 0.2


def reach(host: str, port: int, seconds: float) -> None:
    """Wait until a server listens there; logs one warning if that takes long.

    Raises ``ConnectionError`` after ``seconds``.
    """
    since, warned = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=WARN_AFTER_SECONDS).close()
            return
        except OSError as error:
            waited = time.monotonic() - since
            if waited >= seconds:
                raise ConnectionError(
                    f"no store answers at {host}:{port} after {waited:.0f} s ({error}); start one: dtrain members"
                ) from error
            if waited >= WARN_AFTER_SECONDS and not warned:
                warned = True
                log.warning("waiting for the store at %s:%d (%s); dtrain members starts one", host, port, error)
            time.sleep(AGAIN_SECONDS)
