"""Suggestions for a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["closest", "hint"]


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that is spelt most like ``name``, or None where none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def hint(name: str | None) -> str:
    """'; did you mean NAME?', or nothing for None."""
    return f"; did you mean {name}?" if name else ""
