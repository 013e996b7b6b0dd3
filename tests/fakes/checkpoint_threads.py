"""All ranks of a mesh in the threads of one process: the fake that tests of checkpoints need."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dtrain.train.checkpoint.state import Placement, RankState
from dtrain.train.checkpoint.write import PartMissing, write

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

    Raises the cause: what the first rank (in rank order) raised that is not `PartMissing`, the word for another's.
    """
    ended = write_each(
        folder, step=step, states=states, shards=shards, shapes=shapes, keep=keep, meta=meta, resumed_from=resumed_from
    )
    errors = [end for end in ended if isinstance(end, Exception)]
    if errors:
        raise next((error for error in errors if not isinstance(error, PartMissing)), errors[0])
    return next(end for end in ended if isinstance(end, Path))


def write_each(
    folder: Path,
    *,
    step: int,
    states: Sequence[RankState],
    shards: int,
    shapes: Mapping[str, Sequence[int]],
    keep: int = 2,
    meta: Mapping[str, object] | None = None,
    resumed_from: Path | None = None,
) -> list[Path | Exception]:
    """As `write_together`, and returns how each rank ended, in rank order: the step folder, or what it raised."""
    barrier = threading.Barrier(len(states), timeout=_PATIENCE_SECONDS)

    def rank(number: int) -> Path | Exception:
        try:
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
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(states)) as threads:
        return list(threads.map(rank, range(len(states))))


def void(_: object) -> None:
    """Throw a result away, where a function without one is asked for."""
