"""All ranks of a mesh in the threads of one process: the fake that tests of checkpoints need."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dtrain.checkpoint.state import Placement, RankState
from dtrain.checkpoint.write import write

_PATIENCE_SECONDS = 60


def write_together(
    folder: Path,
    *,
    step: int,
    states: Sequence[RankState],
    shards: int,
    shapes: Mapping[str, Sequence[int]],
    keep: int = 2,
    meta: Mapping[str, object] | None = None,
    resumed_from: Path | None = None,
) -> Path:
    """`write` for every rank at once; ``states`` in rank order, ``shards`` of them per replica.

    Raises what the first rank (in rank order) raised that raised at all.
    """
    barrier = threading.Barrier(len(states), timeout=_PATIENCE_SECONDS)

    def rank(number: int) -> Path:
        return write(
            folder,
            step=step,
            state=states[number],
            place=Placement(number // shards, len(states) // shards, number % shards, shards),
            shapes=shapes,
            barrier=lambda: void(barrier.wait()),
            keep=keep,
            meta=meta,
            resumed_from=resumed_from,
        )

    with ThreadPoolExecutor(len(states)) as threads:
        running = [threads.submit(rank, number) for number in range(len(states))]
        paths = [future.result() for future in running]
    return paths[0]


def void(_: object) -> None:
    """Throw a result away, where a function without one is asked for."""
