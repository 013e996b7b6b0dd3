"""Writes each row to metrics.jsonl, and its numbers to the sinks that were asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from dtrain.train.config.compatibility import flat
from dtrain.train.metrics.rows import Row, Value, as_line
from dtrain.train.metrics.sinks import Sink, opened

__all__ = ["MetricsWriter"]


class MetricsWriter:
    """Appends rows to ``folder/metrics.jsonl`` and, from the first row on, to ``sinks``, by their names.

    With ``enabled=False`` (every rank but one) it does nothing. ``settings``: the configuration, which sinks show
    with the run. ``purge_step``: at a resume, the first step that is trained again; what an earlier process
    wrote from that step on is hidden where a sink can. A sink whose package is missing is left out without a word, as
    `require` has told of it before the launch; of one that fails a warning tells once, and the others go on. A context
    manager.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool,
        purge_step: int | None = None,
        sinks: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self._folder = folder
        self._purge_step = purge_step
        self._names = sinks
        self._settings = flat(settings or {})
        self._written = False
        self._file: TextIO | None = None
        self._sinks: dict[str, Sink] = {}
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
            for name in self._names:
                self._open(name)
        numbers = _numbers(row)
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(numbers, step)
            except Exception as error:  # TensorBoard writes in a thread, and raises later whatever went wrong there
                del self._sinks[name]
                self._warn(name, error)

    def close(self) -> None:
        """Flush and close all. Closing twice is fine."""
        sinks, self._sinks = self._sinks, {}
        for name, sink in sinks.items():
            try:
                sink.close()
            except Exception as error:
                self._warn(name, error)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, name: str) -> None:
        try:
            self._sinks[name] = opened(name, self._folder, self._settings, self._purge_step)
        except ImportError:
            return
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        """A sink must not end a run: the rows are in metrics.jsonl."""
        warnings.warn(
            f"{self._folder / name} is written no more, as it failed ({type(error).__name__}: {error}); metrics.jsonl "
            "goes on",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _numbers(row: Mapping[str, Value]) -> dict[str, float]:
    numbers: Row = {name: value for name, value in row.items() if name != "step" and not isinstance(value, bool)}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float) and math.isfinite(value)}


def _drop_torn_end(path: Path) -> None:
    """Else the first row would be joined to the torn row of a killed process, and both be lost."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
