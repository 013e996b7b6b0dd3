"""The verbs of the command line, a file each: ``add(verbs)`` describes one to argparse and names what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dtrain.errors import ConfigError

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


LAUNCHER_WORDS = ("launcher", "run.dir=", "@")
"""Prefixes of the words that verbs without training take."""


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


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-dir``, which `words_of` turns into words."""
    parser.add_argument(
        "--config-dir", action="append", default=[], metavar="FOLDER",
        help="choices of your own: FOLDER/sync/mine.yaml is sync=mine; the same as @FOLDER",
    )  # fmt: skip


def words_of(chosen: argparse.Namespace) -> list[str]:
    """The overrides of a command line, with its folders of choices.

    Raises:
        ConfigError: such a folder does not exist.
    """
    for folder in chosen.config_dir:
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(f"--config-dir {folder}: there is no such folder")
    return [*(f"@{folder}" for folder in chosen.config_dir), *chosen.words]
