"""Follows a metrics.jsonl that another process appends to, and that a restart may truncate."""

from __future__ import annotations

import os
from pathlib import Path

from dtrain.train.metrics.rows import Row, parse

__all__ = ["Tail"]


class Tail:
    """Reads the rows that were added since the last look. ``past``: what the file held at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_number = -1
        self._offset = 0
        self.past = self.rows()

    def rows(self) -> list[Row]:
        """The new rows, in order; an incomplete line is left for the next call.

        A truncated file is a new one and is read from its start: the step goes back.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._file_number or status.st_size < self._offset:
                self._file_number, self._offset = status.st_ino, 0
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        parsed = (parse(line.decode(errors="replace")) for line in complete.splitlines())
        return [row for row in parsed if row is not None]
