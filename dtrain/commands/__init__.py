"""The verbs of the command line, a file each: ``add(verbs)`` describes one to argparse and names what it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


class Command(Protocol):
    """A module of this folder."""

    def add(self, verbs: Verbs) -> None:
        """Add the verb: its help, its arguments, and ``run``, which takes them and returns the exit code."""


def add_verb(verbs: Verbs, name: str, *, does: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser for the verb ``name`` (or for a verb below one), in the form that all of them have."""
    return verbs.add_parser(
        name, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
