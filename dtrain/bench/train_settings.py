"""The settings of `dtrain bench train`, given as bench.KEY=VALUE, and the syncs that they name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.bench.settings import FILE
from dtrain.errors import ConfigError
from dtrain.launchers.strict_json import Damaged, json_in, shaped

__all__ = ["TrainSettings", "cell_folder", "parse", "words_of_sync"]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A benchmark of syncs in training.

    ``syncs``: what is compared, each as `words_of_sync` reads it; the others are held to the first. ``rounds``: how
    often each is timed, between two blocks of training without communication. ``block_steps``: the fewest steps of a
    block; it is made longer to have whole rounds of a local update. ``warmup``: rounds before those. ``steps``: how
    long each is trained for its losses; 0: not at all. ``loss``: the one that all are to reach; 0: that of the first's
    end.
    """

    syncs: tuple[str, ...] = ("dense", "bf16", "int8_ef", "diloco")
    rounds: int = 9
    block_steps: int = 10
    warmup: int = 1
    steps: int = 0
    loss: float = 0.0

    def write(self, folder: Path) -> None:
        """Write the settings for the ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> TrainSettings:
        """Read the file that `write` wrote. Raises ``ConfigError`` for what is damaged."""
        try:
            return shaped(cls, json_in(path))
        except Damaged as error:
            raise ConfigError(f"{path} is damaged: {error}; give the command again") from error


def parse(words: Sequence[str]) -> tuple[TrainSettings, list[str]]:
    """The settings, and the remaining words: those of `dtrain train`.

    Raises:
        ConfigError: an unknown key (with the nearest one), an invalid value, a sync that there is not.
    """
    values: dict[str, object] = {}
    others = []
    kinds = {field.name: type(getattr(TrainSettings(), field.name)) for field in dataclasses.fields(TrainSettings)}
    for word in words:
        if not word.startswith("bench."):
            others.append(word)
            continue
        key, equals, text = word.removeprefix("bench.").partition("=")
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            hint = f"; did you mean bench.{near[0]}?" if near else ""
            raise ConfigError(f"there is no setting bench.{key} of bench train{hint} (there are {', '.join(kinds)})")
        if not equals:
            raise ConfigError(f"{word} has no value; write bench.{key}=...")
        values[key] = _value(key, kinds[key], text)
    settings = dataclasses.replace(TrainSettings(), **values)  # type: ignore[arg-type]  # checked by _value
    _check(settings)
    return settings, others


def words_of_sync(name: str) -> tuple[str, ...]:
    """The words of `dtrain train` for a sync: a choice of the group sync, or of compress for every step's gradients.

    ``diloco/50:int8`` is DiLoCo with rounds of 50 steps and int8 deltas; both additions may be left out.

    Raises:
        ConfigError: there is no such choice.

    >>> words_of_sync("int8_ef"), words_of_sync("diloco/50:int8")
    (('sync=every_step', 'compress=int8_ef'), ('sync=diloco', 'sync.every_steps=50', 'compress=int8'))
    """
    match = re.fullmatch(r"(\w+)(?:/(\d+))?(?::(\w+))?", name)
    if match is None:
        raise ConfigError(f"bench.syncs: {name!r} is no sync; write diloco, diloco/50 (every 50 steps) or diloco:int8")
    sync, every, compress = match.groups()
    if sync not in _choices("sync") and every is None and compress is None:
        _require(sync, [*_choices("sync"), *_choices("compress")])
        return "sync=every_step", f"compress={sync}"
    _require(sync, _choices("sync"))
    words = [f"sync={sync}"]
    if every is not None:
        words.append(f"sync.every_steps={every}")
    if compress is not None:
        _require(compress, _choices("compress"))
        words.append(f"compress={compress}")
    return tuple(words)


def cell_folder(number: int, name: str) -> str:
    """The folder of the ``number``-th sync's run below that of the benchmark.

    >>> cell_folder(3, "diloco/50:int8")
    '03-diloco-50-int8'
    """
    return f"{number:02}-{re.sub('[/:]', '-', name)}"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _require(name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        near = difflib.get_close_matches(name, choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"bench.syncs: there is no {name}{hint} (there are {', '.join(choices)})")


def _value(key: str, kind: type, text: str) -> object:
    if kind is tuple:
        return tuple(name.strip() for name in text.strip("[]").split(",") if name.strip())
    try:
        return kind(text)
    except ValueError as error:
        example = "2.5" if kind is float else "20"
        raise ConfigError(f"bench.{key} must be a number such as {example}, but is {text!r}") from error


def _check(settings: TrainSettings) -> None:
    if not settings.syncs:
        raise ConfigError("bench.syncs names none; write bench.syncs=dense,diloco")
    if len(set(settings.syncs)) < len(settings.syncs):
        raise ConfigError(f"bench.syncs={','.join(settings.syncs)} names one twice")
    for name in settings.syncs:
        words_of_sync(name)
    for key, least in {"rounds": 1, "block_steps": 1, "warmup": 0, "steps": 0}.items():
        if getattr(settings, key) < least:
            raise ConfigError(f"bench.{key} must be at least {least}, but is {getattr(settings, key)}")
    if not (settings.loss >= 0 and math.isfinite(settings.loss)):
        raise ConfigError(f"bench.loss must be a loss, or 0 for that of the first sync's end, but is {settings.loss}")
    if settings.loss and not settings.steps:
        raise ConfigError("bench.loss is reached by training: set bench.steps, too")
