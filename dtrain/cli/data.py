"""``dtrain data``: prepares data, before any training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import add_verb
from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.cli import Verbs

TOKENIZE = """\
settings:
  source=FOLDER         the folder of text files
  out=FOLDER            where the token files go
  tokenizer=bytes       or the path of a tokenizer.json (needs: pip install 'dtrain[text]')
  held_out=0.05         the fraction of the text that is kept for validation

example:
  dtrain data tokenize source=texts/ out=tokens/ && dtrain train data=tokens data.path=tokens/
"""


def add(verbs: Verbs) -> None:
    """Add ``data tokenize``."""
    below = add_verb(verbs, "data", does="prepare data").add_subparsers(required=True, metavar="VERB")
    tokenize = add_verb(below, "tokenize", does="turn text files into token files", epilog=TOKENIZE)
    tokenize.add_argument("words", nargs="*", metavar="KEY=VALUE")
    tokenize.set_defaults(run=_tokenize)


def _tokenize(chosen: argparse.Namespace) -> int:
    from dtrain.nearest import closest, hint
    from dtrain.train.data.tokenize import tokenize

    values: dict[str, str] = {"tokenizer": "bytes", "held_out": "0.05"}
    names = ("source", "out", "tokenizer", "held_out")
    for setting in chosen.words:
        key, equals, value = setting.partition("=")
        if not equals or key not in names:
            near = hint(closest(key, names))
            raise ConfigError(f"{setting}: there is no such setting{near} (there are {', '.join(names)})")
        values[key] = value
    missing = [key for key in names if not values.get(key)]
    if missing:
        raise ConfigError(f"say what {missing[0]} is: dtrain data tokenize source=FOLDER out=FOLDER")
    try:
        held_out = float(values["held_out"])
    except ValueError as error:
        raise ConfigError(f"held_out must be a number between 0 and 1, but is {values['held_out']!r}") from error
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out must be more than 0 and less than 1, but is {held_out}")
    written = tokenize(
        source=Path(values["source"]), out=Path(values["out"]), tokenizer=values["tokenizer"], held_out=held_out
    )
    print(json.dumps(written, indent=2))
    return 0
