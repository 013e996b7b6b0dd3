"""Keep Python's garbage collector away from objects that stay: modules, and what they made while they were loaded.

A process that has loaded torch holds a quarter of a million objects. Each full collection scans all of them, for an
eighth of a second in which the other ranks wait; during imports it takes a quarter of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Disable collection within the block, and exempt what exists at its end from later ones (`gc.freeze`)."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
