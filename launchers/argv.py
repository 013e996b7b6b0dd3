"""A program's words on their way through mpirun and srun, both of which take a lone colon for the end of a command.

So a word that is nothing but colons gets one more where the command line is written, and loses it in the rank.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["received", "sent"]


def sent(words: Iterable[str]) -> list[str]:
    """The words as they stand on the command line of mpirun or srun.

    >>> sent(["train.py", "a", ":", "b:c", "::"])
    ['train.py', 'a', '::', 'b:c', ':::']
    """
    return [f"{word}:" if _colons(word) else word for word in words]


def received(words: Iterable[str]) -> list[str]:
    """The words that `sent` was given.

    >>> received(sent([":", "", "::", "x"]))
    [':', '', '::', 'x']
    """
    return [word[:-1] if _colons(word) else word for word in words]


def _colons(word: str) -> bool:
    return bool(word) and not word.strip(":")
