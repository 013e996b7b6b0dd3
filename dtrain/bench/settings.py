"""The settings of `dtrain bench`, given as bench.KEY=VALUE."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import ConfigError
from dtrain.launchers.strict_json import Damaged, json_in, shaped

__all__ = ["DTYPES", "Settings", "link_mbit", "parse"]

FILE = "bench.json"
DTYPES = ("float32", "float64", "bfloat16", "float16", "int32", "uint8")
TRANSPORTS = ("auto", "torch", "mpi")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A sweep. Bytes are those of the whole buffer, as nccl-tests counts them; M is 10^6.

    ``seconds``: a row ends once this long has passed, or after ``iterations``. ``link``: the rate of each rank's link,
    such as 100mbit; "auto" is that of the `dtrain cluster` that it runs on, "none" not known. ``transport``: what
    carries the ops of `comm`: "torch" (gloo or NCCL), "mpi", or "auto": MPI where MPI starts the ranks.
    """

    ops: tuple[str, ...] = ("all",)
    min_bytes: int = 4000
    max_bytes: int = 16_000_000
    factor: int = 4
    iterations: int = 20
    seconds: float = 3.0
    warmup: int = 2
    dtype: str = "float32"
    link: str = "auto"
    transport: str = "auto"

    def sizes(self) -> list[int]:
        """Bytes of each row of one op, the largest included.

        >>> Settings(min_bytes=1000, max_bytes=10000, factor=4).sizes()
        [1000, 4000, 10000]
        """
        sizes, size = [], self.min_bytes
        while size < self.max_bytes:
            sizes.append(size)
            size *= self.factor
        return [*sizes, self.max_bytes]

    def write(self, folder: Path) -> None:
        """Write the settings for the ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read the file that `write` wrote. Raises ``ConfigError`` for what is damaged."""
        try:
            return shaped(cls, json_in(path))
        except Damaged as error:
            raise ConfigError(f"{path} is damaged: {error}; give the command again") from error


def parse(words: Sequence[str], groups: Mapping[str, Sequence[str]]) -> tuple[Settings, list[str]]:
    """The settings, with groups of ops replaced by their ops, and the remaining words.

    ``groups``: the ops of each group; "all" has every op.

    Raises:
        ConfigError: an unknown key (with the nearest one), an unknown op, an invalid value.
    """
    values: dict[str, object] = {}
    others = []
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for word in words:
        if not word.startswith("bench."):
            others.append(word)
            continue
        key, equals, value = word.removeprefix("bench.").partition("=")
        if key not in fields:
            raise ConfigError(f"there is no setting bench.{key}{_nearest(key, list(fields), 'bench.')}")
        if not equals:
            raise ConfigError(f"{word} has no value; write bench.{key}={_shown(getattr(Settings(), key))}")
        values[key] = _value(key, value)
    settings = dataclasses.replace(Settings(), **values)  # type: ignore[arg-type]  # checked by _value
    _check(settings, groups)
    ops = tuple(op for name in settings.ops for op in groups.get(name, (name,)))
    return dataclasses.replace(settings, ops=ops), others


def link_mbit(text: str) -> float:
    """A rate such as 100mbit or 2.5gbit in Mbit/s of 10^6; 0 for "none".

    Raises:
        ConfigError: it is no rate.

    >>> link_mbit("1gbit")
    1000.0
    """
    if text == "none":
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)bit", text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"bench.link={text} is no rate; write 100mbit or 1gbit, auto, or none if it is not known")
    return float(match[1]) * {"k": 1e-3, "m": 1.0, "g": 1e3}[match[2]]


def _value(key: str, text: str) -> object:
    if key == "ops":
        return tuple(name.strip() for name in text.strip("[]").split(","))
    if key in ("dtype", "transport", "link"):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.upper())
    if match is None or (key != "seconds" and float(match[1]) * UNITS[match[2]] % 1):
        example = {"seconds": "2.5"}.get(key, "4000 or 16M" if "bytes" in key else "20")
        raise ConfigError(f"bench.{key} must be a number such as {example}, but is {text!r}")
    number = float(match[1]) * UNITS[match[2]]
    return number if key == "seconds" else round(number)


def _check(settings: Settings, groups: Mapping[str, Sequence[str]]) -> None:
    for op in settings.ops:
        if op not in groups["all"] and op not in groups:
            raise ConfigError(
                f"there is nothing called {op or repr(op)} to measure{_nearest(op, [*groups, *groups['all']], '')}"
            )
    for key, choices in {"dtype": DTYPES, "transport": TRANSPORTS}.items():
        if getattr(settings, key) not in choices:
            raise ConfigError(f"bench.{key} is {getattr(settings, key)}; choose one of {', '.join(choices)}")
    if settings.link != "auto":
        link_mbit(settings.link)
    if not 0 < settings.min_bytes <= settings.max_bytes:
        raise ConfigError(f"bench.min_bytes={settings.min_bytes} and bench.max_bytes={settings.max_bytes} are no range")
    if settings.factor < 2 or settings.iterations < 1 or settings.seconds <= 0:
        raise ConfigError("bench.factor is at least 2, bench.iterations at least 1, bench.seconds more than 0")


def _nearest(word: str, choices: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(word, choices, 1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"{hint} (there are {', '.join(choices)})"


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
