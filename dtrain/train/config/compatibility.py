"""Which keys may differ between a stored run and the one that resumes it; all others are refused, key by key."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dtrain.errors import ResumeError
from dtrain.train.config.schema import Config

MAY_CHANGE_AT_RESUME: Mapping[str, str] = {
    "run.*": "where a run lives does not affect results",
    "metrics": "where rows of metrics go does not affect results",
    "launcher.*": "how workers start does not affect results; their number is the mesh's",
    "mesh.*": "a checkpoint is stored by FQN and range of elements, and is assembled for any mesh",
    "engine.*": "a checkpoint does not depend on the engine",
    "train.steps": "a run may be made longer or shorter; the learning rate follows the new schedule from there on",
    "train.stop_after_steps": "where a run pauses does not change its schedule",
    "train.checkpoint_every_steps": "writing checkpoints does not affect results",
    "train.keep_checkpoints": "writing checkpoints does not affect results",
    "train.evaluat*": "evaluation is read-only",
    "train.log_every_steps": "logging is read-only",
    "train.agree_every_steps": "how often stopping is agreed on changes when a run can stop, not what it computes",
    "train.max_skipped_steps": "the limit only decides when to give up",
    "sync.verify_every": "comparing replicas is read-only",
    "sync.tie": "it only decides what happens where replicas differ",
    "sync.log": "a log only records; one in another folder begins where the run resumes",
    "train.microbatch_size": "the same examples in other microbatches: equal to round-off; another mesh may need it",
}
"""Patterns of keys that may change at a resume, each with the reason. ``*`` stands for anything."""

WHERE_THE_DATA_LIE = ("data.path", "data.root", "data.folder", "data.dir", "data.file")
"""May change too, if the digest shows that the data are the same."""

ABSENT = "(absent)"


class Difference(NamedTuple):
    """One key whose value differs; ``ABSENT`` stands for a key that one side does not have."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        """``key: old -> new``."""
        return f"{self.key}: {_value(self.old)} -> {_value(self.new)}"


def differences(old: Config, new: Config) -> list[Difference]:
    """Every key whose value differs, in the order of the keys."""
    left, right = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    keys = [*left, *(key for key in right if key not in left)]
    pairs = ((key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys)
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def check_resume(old: Config, new: Config, *, same_data: bool = False) -> None:
    """Refuse to resume a run of ``old`` under ``new`` if a difference would change what is computed.

    ``same_data``: a digest shows that the data are the same, wherever they are now.

    Raises:
        ResumeError: listing each such key with its old and its new value, and what to do.
    """
    may = [*MAY_CHANGE_AT_RESUME, *(WHERE_THE_DATA_LIE if same_data else ())]
    changed = [d for d in differences(old, new) if not any(fnmatch.fnmatchcase(d.key, p) for p in may)]
    if not changed:
        return
    refused = _by_target(changed, dataclasses.asdict(old), dataclasses.asdict(new))
    lines = "".join(f"\n    {difference}" for difference in refused)
    plain = [f"{d.key}={_value(d.old)}" for d in refused if not d.key.endswith("_target_") and d.old != ABSENT]
    folder = old.run.dir or "the stored run"
    rest = len(plain) < len(refused)
    back = [*([" ".join(plain)] if plain else []), *([f"the choices of {folder}/config.yaml"] if rest else [])]
    raise ResumeError(
        f"{folder} cannot go on like this: what these keys say may not change at a resume (then -> now):{lines}\n"
        f"go on with what was: {', and '.join(back)}\n"
        "or begin at step 0 with its weights and all else anew: a run.dir that has no run yet, without run.resume, and "
        f"run.weights={_weights(new, folder)}\n"
        "or start from step 0: a run.dir that has no run yet, without run.resume"
    )


def _weights(new: Config, folder: str) -> str:
    """What to start from instead of resuming: the requested checkpoint, or one of the run."""
    return new.run.resume if new.run.resume not in ("auto", "never") else f"{folder}/checkpoints/step-N"


def _by_target(changed: Sequence[Difference], old: Mapping[str, object], new: Mapping[str, object]) -> list[Difference]:
    """Report a mapping whose ``_target_`` has changed as one difference.

    Its keywords belong to one target or the other, so they cannot be restored one by one.
    """
    others = {d.key.removesuffix("._target_") for d in changed if d.key.endswith("._target_")}
    kept: list[Difference] = []
    for difference in changed:
        above = [place for place in others if difference.key == place or difference.key.startswith(place + ".")]
        if not above:
            kept.append(difference)
        elif difference.key == f"{min(above, key=len)}._target_":
            place = min(above, key=len)
            then, now = _made_by(old, place), _made_by(new, place)
            whole = isinstance(then, _Target) and isinstance(now, _Target)
            kept.append(Difference(f"{place}._target_" if whole else place, then, now))
    return kept


class _Target(str):
    """The ``_target_`` of a mapping."""


def _made_by(values: Mapping[str, object], place: str) -> object:
    """The value of a key; for a ``_target_`` mapping its target."""
    value: object = values
    for key in place.split("."):
        value = value.get(key, ABSENT) if isinstance(value, Mapping) else ABSENT
    return _Target(value["_target_"]) if isinstance(value, Mapping) and "_target_" in value else value


def _value(value: object) -> str:
    """A value as written in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    return f"{value}"


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one of dotted keys; lists are values."""
    dotted: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            dotted.update(flat(value, f"{prefix}{key}."))
        else:
            dotted[prefix + key] = value
    return dotted
