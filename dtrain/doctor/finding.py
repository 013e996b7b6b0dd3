"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level"]

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One check on one host. ``what``: with values; ``way_out``: empty where nothing is wrong."""

    host: str
    check: str
    level: Level
    what: str
    way_out: str = ""
