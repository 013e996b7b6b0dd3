"""The progress line of a run, shown by the launching process from what rank 0 writes to metrics.jsonl.

Where no process shows it, rank 0 prints the same lines into its log, by `printer`.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from dtrain.report.figures import in_bytes
from dtrain.report.tail import Tail
from dtrain.train.metrics.rows import Row

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Progress", "printer", "say"]

LOOK_SECONDS = 0.2
RATE_ROWS = 20  # tokens per second over this many rows: one row alone jumps about
STARTING = "starting workers"


class Progress:
    """Context manager: while it is open, a thread follows ``path`` and shows the progress towards ``steps``.

    On a terminal it is one line that rich keeps up to date, with results and decisions printed above it. Otherwise
    (a file, a pipe) every row is a plain line of its own, without control characters: how many there are is up to
    ``train.log_every_steps``.
    """

    def __init__(self, path: Path, *, steps: int, stream: TextIO | None = None) -> None:
        self._tail = Tail(path)
        self._state = _State(steps)
        for row in self._tail.past:
            self._state.note(row)
        stream = stream or sys.stdout
        self._view: _View = _Live(stream, steps) if stream.isatty() else _Plain(stream)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="dtrain-progress", daemon=True)

    def __enter__(self) -> Progress:
        self._view.open()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Show the last rows and give the terminal back. Closing twice is fine."""
        if self._leave.is_set():
            return
        self._leave.set()
        self._thread.join()
        self._look()
        self._view.close(self._state.line())

    def say(self, text: str) -> None:
        """Print a line of its own above the progress, for example that the workers restart."""
        self._view.say(text)

    def _follow(self) -> None:
        while not self._leave.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        for row in self._tail.rows():
            new = self._state.note(row)
            message = _message(row)
            if message is not None:
                if new:
                    self._view.say(message)
                continue
            self._state.take(row)
            self._view.show(self._state.step, self._state.line(), new=new)


def printer(steps: int, stream: TextIO | None = None) -> Callable[[Row], None]:
    """Prints each row that it is called with as a plain line of ``stream`` (standard output), towards ``steps``.

    >>> show = printer(300)
    >>> show({"step": 10, "loss": 2.5, "tokens": 4000, "seconds": 2.0, "sent_bytes": 1000, "exposed_seconds": 0.5})
    step 10/300  loss 2.5000  2,000 tokens/s  sent 1.00 kB per rank  exposed communication 25.0 %
    >>> show({"step": 10, "validation_loss": 2.25})
    step 10: validation loss 2.2500
    """
    state, view = _State(steps), _Plain(stream or sys.stdout)

    def show(row: Row) -> None:
        message = _message(row)
        if message is not None:
            view.say(message)
            return
        state.take(row)
        view.say(state.line())

    return show


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line. If its reader has left (``| head``), this and all later output is dropped: the run continues."""
    stream = stream or sys.stdout
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


class _State:
    """The rows so far."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._rows: deque[Row] = deque(maxlen=RATE_ROWS)
        self._seen: set[tuple[object, ...]] = set()

    @property
    def step(self) -> int:
        return int(_number(self._rows[-1], "step") or 0) if self._rows else 0

    def take(self, row: Row) -> None:
        """Add a row of a training step."""
        if self._rows and (_number(row, "step") or 0) <= (_number(self._rows[-1], "step") or 0):
            self._rows.clear()
        self._rows.append(row)

    def note(self, row: Row) -> bool:
        """Whether this row is new: a truncated file is read again from its start."""
        result = tuple(row.get(name) for name in ("step", "validation_loss", "decision", "loss", "seconds"))
        seen = result in self._seen
        self._seen.add(result)
        return not seen

    def line(self) -> str:
        """The whole progress line, without a newline."""
        if not self._rows:
            return STARTING
        first, last = self._rows[0], self._rows[-1]
        fields = [f"step {self.step:,}/{self._steps:,}", f"loss {_figure(last, 'loss')}"]
        # With one row so far the cumulative figures are all there is.
        since = first if len(self._rows) > 1 else {}
        seconds = _difference(since, last, "seconds")
        if seconds:
            fields.append(f"{(_difference(since, last, 'tokens') or 0) / seconds:,.0f} tokens/s")
        sent = _number(last, "sent_bytes")
        if sent is not None:
            fields.append(f"sent {in_bytes(sent)} per rank")
        exposed = _difference(since, last, "exposed_seconds")
        if seconds and exposed is not None:
            fields.append(f"exposed communication {100 * exposed / seconds:.1f} %")
        return "  ".join(fields)


def _message(row: Row) -> str | None:
    """The message of a row that is not a training step's; None for one that is."""
    if "validation_loss" in row:
        return f"step {row.get('step')}: validation loss {_figure(row, 'validation_loss')}"
    if "decision" in row:
        return f"step {row.get('step')}: {row['decision']}"
    return None


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _figure(row: Row, name: str) -> str:
    value = _number(row, name)
    return "not finite" if value is None else f"{value:.4f}"


def _difference(first: Row, last: Row, name: str) -> float | None:
    end = _number(last, name)
    return None if end is None else end - (_number(first, name) or 0.0)


class _View(Protocol):
    def open(self) -> None: ...
    def show(self, step: int, line: str, *, new: bool) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self, line: str) -> None: ...


class _Plain:
    """Lines for files and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._printed = ""

    def open(self) -> None:
        self.say(STARTING)
        self._printed = STARTING

    def show(self, step: int, line: str, *, new: bool) -> None:
        if new:
            self._printed = line
            self.say(line)

    def say(self, text: str) -> None:
        say(text, self._stream)

    def close(self, line: str) -> None:
        if line != self._printed:
            self.say(line)


class _Live:
    """One line that rich redraws."""

    def __init__(self, stream: TextIO, steps: int) -> None:
        self._stream = stream
        self._steps = steps
        self._bar: Bar | None = None

    def open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        # The text may be cut at its end in a narrow terminal, but it never takes a second line.
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._bar = Bar(BarColumn(bar_width=16), text, console=Console(file=self._stream), refresh_per_second=5)
        self._task = self._bar.add_task(STARTING, total=self._steps)
        self._bar.start()

    def show(self, step: int, line: str, *, new: bool) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self, line: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=line)
            self._bar.stop()
