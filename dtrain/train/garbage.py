"""Python's garbage collection, kept away from what stays: modules, and what they made while they were loaded.

A process that has loaded torch holds a quarter of a million objects. Each full collection looks at all of them, for an
eighth of a second in which the other ranks wait for this one; while modules are loaded it is a quarter of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Nothing is collected within it, and nothing that is there at its end will be looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
