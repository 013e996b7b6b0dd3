"""Syncs from the words of a command line, without a run around them."""

from __future__ import annotations

import functools
from typing import cast

from dtrain.comm.runtime.method import Sync
from dtrain.errors import ConfigError
from dtrain.train.config import compose, instantiate

__all__ = ["sync_of"]


@functools.cache
def sync_of(words: tuple[str, ...]) -> Sync:
    """The sync of ``sync=...`` and ``sync.KEY=...``; dtrain train's by default.

    Raises ``ConfigError`` for words that it does not take, and for lossless coding, whose bytes depend on values.
    """
    sync = cast(Sync, instantiate(compose([*words, "data.path=none", "run.dir=none"]).sync, "sync"))
    if getattr(getattr(sync, "exchange", sync), "lossless", None) is not None:
        raise ConfigError(
            "lossless codes values, of which a simulation has none, in as many bytes as they happen to take; leave "
            "sync.lossless out: what is simulated is then the most that is sent"
        )
    return sync
