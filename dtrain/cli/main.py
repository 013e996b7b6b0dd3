"""The command ``dtrain``: reads the command line, checks it before anything starts, and reports how it ended."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO, cast

from dtrain import __version__
from dtrain.cli.verbs import COMMANDS
from dtrain.errors import DtrainError
from dtrain.extras import missing
from dtrain.launchers.exit_codes import INTERRUPTED

TOP = """\
examples:
  dtrain train                                    the default: 4 workers, FSDP2, DiLoCo with int8 deltas
  dtrain train engine=zero2 sync=every_step compress=int8_ef train.steps=500 run.dir=runs/x
  dtrain train --dry-run sync=local_sgd           print the configuration and the command, start nothing
  dtrain data tokenize source=texts/ out=tokens/
  dtrain eval runs/x                              loss, perplexity, bits per byte of what a run has trained
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors of dtrain's are one line, others keep their traceback."""
    # Modules of the user's (`_target_`: mine.Model) are found as the workers find them, from the current folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    chosen = _parsed(arguments)
    try:
        with _reader_may_leave(goes_on=getattr(chosen, "outlives_reader", False)):
            code: int = chosen.run(chosen)
    except DtrainError as error:
        print(f"dtrain: error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        lacking = missing(error)
        if lacking is None:
            raise
        print(f"dtrain: error: {lacking}", file=sys.stderr)
        return lacking.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    return code


@contextlib.contextmanager
def _reader_may_leave(*, goes_on: bool) -> Iterator[None]:
    """Standard output may be closed by its reader (``dtrain ... | head``): later output is dropped.

    A command that only prints ends there, by a ``BrokenPipeError``; one that trains ``goes_on``.
    """
    stream = sys.stdout
    if goes_on:
        sys.stdout = cast(TextIO, _Outliving(stream))
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        _drop(stream)
        if not goes_on:
            raise
    finally:
        sys.stdout = stream


class _Outliving:
    """A stream that drops its output once its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of a text stream."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        """As of a text stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            _drop(self._stream)


def _drop(stream: TextIO) -> None:
    """Drop all further writes, also those at the interpreter's exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    chosen, more = parser.parse_known_args(given[:cut])
    program = given[cut + 1 :]
    if cut < len(given) and not getattr(chosen, "takes_program", False):
        parser.error(f"only launch and cluster exec take a program after --, but there is {program}")
    chosen.program = program
    # argparse stops collecting words at an option: `train engine=ddp --dry-run run.dir=x`.
    unknown = [word for word in more if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    chosen.words = [*getattr(chosen, "words", []), *more]
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtrain", epilog=TOP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Train one model on many machines whose links are too slow, too busy or too unreliable for plain "
        "data parallelism.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dtrain {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for command in COMMANDS:
        command.add(verbs)
    return parser
