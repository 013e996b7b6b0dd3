"""Keywords of a Python call as the words of a command line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from dtrain.errors import ConfigError
from dtrain.train.config.words import written

__all__ = ["as_words"]


def as_words(settings: Mapping[str, object], prefix: str = "") -> list[str]:
    """The words that set what the keywords say; a mapping with ``_target_`` stands for the whole section, as in a file.

    >>> as_words({"sync": "diloco", "train": {"steps": 50}, "optim": {"inner": {"betas": [0.9, 0.95]}}})
    ['sync=diloco', 'train.steps=50', 'optim.inner.betas=[0.9,0.95]']

    Raises:
        ConfigError: a value that no configuration holds.
    """
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and "_target_" not in value:
            words += as_words(value, f"{prefix}{key}.")
        elif isinstance(value, str | os.PathLike):
            words.append(written(prefix + key, os.fspath(value)))
        else:
            words.append(f"{prefix}{key}={_text(value)}")
    return words


def _text(value: object) -> str:
    """A value in hydra's grammar."""
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, os.PathLike):
        return _text(os.fspath(value))
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_text(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    raise ConfigError(f"{value!r:.80} is a {type(value).__name__}, and settings are text, numbers, lists and mappings")
