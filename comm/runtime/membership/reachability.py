"""Whether something listens at an address, asked before torch asks, whose wait is long and silent."""

from __future__ import annotations

import logging
import socket
import time

log = logging.getLogger(__name__)

SAY_AFTER_SECONDS, AGAIN_SECONDS = 5.0, 0.2


def reach(host: str, port: int, seconds: float) -> None:
    """Wait until something listens there, which may begin after this; says so once where it takes longer.

    Raises ``ConnectionError`` after ``seconds``.
    """
    since, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=SAY_AFTER_SECONDS).close()
            return
        except OSError as error:
            waited = time.monotonic() - since
            if waited >= seconds:
                raise ConnectionError(
                    f"no store answers at {host}:{port} after {waited:.0f} s ({error}); start one: dtrain members"
                ) from error
            if waited >= SAY_AFTER_SECONDS and not said:
                said = True
                log.warning("waiting for the store at %s:%d (%s); dtrain members starts one", host, port, error)
            time.sleep(AGAIN_SECONDS)
