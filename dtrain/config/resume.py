"""What may differ between a stored run and the one that goes on from it; everything else is refused, key by key."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import NamedTuple

from dtrain.config.schema import Config
from dtrain.errors import ResumeError

MAY_CHANGE_AT_RESUME: Mapping[str, str] = {
    "run.*": "where a run lives has no part in what it computes",
    "launcher.*": "how workers start has no part in what they compute; their number is the mesh's",
    "mesh.*": "a checkpoint is cut by FQN and range of elements, and is put together for any mesh",
    "engine.*": "a checkpoint does not depend on the engine",
    "train.steps": "a run may be made longer or shorter; the schedule of the learning rate follows from there on",
    "train.stop_after_steps": "where a run pauses leaves its schedule as it is",
    "train.checkpoint_every_steps": "checkpoints only record",
    "train.keep_checkpoints": "checkpoints only record",
    "train.evaluat*": "evaluation only looks",
    "train.log_every_steps": "logging only looks",
    "train.agree_every_steps": "how often stopping is agreed on changes when a run can stop, not what it computes",
    "train.max_skipped_steps": "the limit only decides when to give up",
    "train.microbatch_size": "the same examples in other pieces: equal to round-off, and another mesh may need it",
}
"""Patterns of keys that may change at a resume, each with the reason. ``*`` stands for anything."""

ABSENT = "(absent)"


class Difference(NamedTuple):
    """One key whose value differs; ``ABSENT`` stands for a key that one side does not have."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        """``key: old -> new``."""
        return f"{self.key}: {self.old} -> {self.new}"


def differences(old: Config, new: Config) -> list[Difference]:
    """Every key whose value differs, in the order of the keys."""
    left, right = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    keys = [*left, *(key for key in right if key not in left)]
    pairs = ((key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys)
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def check_resume(old: Config, new: Config) -> None:
    """Refuse to go on from a run of ``old`` under ``new`` if anything differs that would change what is computed.

    Raises:
        ResumeError: listing each such key with its old and its new value.
    """
    refused = [d for d in differences(old, new) if not any(fnmatch.fnmatchcase(d.key, p) for p in MAY_CHANGE_AT_RESUME)]
    if refused:
        lines = "".join(f"\n    {difference}" for difference in refused)
        raise ResumeError(
            f"the stored run cannot go on with another configuration; stored -> asked for:{lines}\n"
            "give these keys their stored values, or start a new run in another run.dir"
        )


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one of dotted keys; lists are values."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
