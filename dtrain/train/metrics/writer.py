"""Writes each row to metrics.jsonl and its numbers to TensorBoard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dtrain.train.metrics.rows import Row, Value, as_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsWriter"]


class MetricsWriter:
    """Appends rows to ``folder/metrics.jsonl`` and, from the first row on, to ``folder/tensorboard/``.

    With ``enabled=False`` (every rank but one) it does nothing. ``purge_step``: at a resume, the first step that is
    trained again; TensorBoard then hides what an earlier process wrote from that step on. Without the tensorboard
    package, or once it has failed, only the JSON lines are written. A context manager.
    """

    def __init__(self, folder: Path, *, enabled: bool, purge_step: int | None = None) -> None:
        self._folder = folder
        self._purge_step = purge_step
        self._written = False
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            _drop_torn_end(path)
            self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, row: Mapping[str, Value]) -> None:
        """Write one row, which must have an integer ``step``. It is flushed when this returns."""
        step = row.get("step")
        if not isinstance(step, int):
            raise ValueError(f"a row of metrics needs an integer step, got {dict(row)}")
        if self._file is None:
            return
        self._file.write(as_line(row))
        self._file.flush()
        if not self._written:
            self._written = True
            self._try(lambda: _open_events(self._folder / "tensorboard", self._purge_step))
        if self._events is not None:
            self._try(lambda: self._add(_numbers(row), step))

    def close(self) -> None:
        """Flush and close both. Closing twice is fine."""
        events, self._events = self._events, None
        if events is not None:
            self._try(lambda: events.close())
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, numbers: Mapping[str, float], step: int) -> SummaryWriter | None:
        for name, value in numbers.items():
            assert self._events is not None
            self._events.add_scalar(name, value, step)
        return self._events

    def _try(self, action: Callable[[], SummaryWriter | None]) -> None:
        """TensorBoard must not end a run: the rows are in metrics.jsonl."""
        try:
            self._events = action()
        except Exception as error:  # TensorBoard writes in a thread, and raises later whatever went wrong there
            self._events = None
            warnings.warn(
                f"{self._folder / 'tensorboard'} is written no more, as it failed ({type(error).__name__}: {error}); "
                "metrics.jsonl goes on",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _numbers(row: Mapping[str, Value]) -> dict[str, float]:
    numbers: Row = {name: value for name, value in row.items() if name != "step" and not isinstance(value, bool)}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float) and math.isfinite(value)}


def _open_events(folder: Path, purge_step: int | None) -> SummaryWriter | None:
    try:
        # Only now: the import takes seconds, and the other ranks never need it.
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)


def _drop_torn_end(path: Path) -> None:
    """Else the first row would be joined to the torn row of a killed process, and both be lost."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
