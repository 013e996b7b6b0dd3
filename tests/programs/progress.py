"""How far a program in another process has come, by files that it writes; and waiting for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def note(folder: Path, name: str, step: int) -> None:
    """This process is at ``step``."""
    (folder / f"{name}.progress").write_text(f"{os.getpid()} {step}")


def write_whole(path: Path, text: str) -> None:
    """For those who wait for the file: it is there with all of its text."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def at(folder: Path, name: str) -> tuple[int, int]:
    """The process of ``name`` and its step; (0, -1) before it has begun."""
    path = folder / f"{name}.progress"
    words = path.read_text().split() if path.exists() else []
    return (int(words[0]), int(words[1])) if len(words) == 2 else (0, -1)


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """Raises ``TimeoutError``."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"what was waited for has not come in {seconds:g} s; look at the logs of the processes")
        time.sleep(0.02)
