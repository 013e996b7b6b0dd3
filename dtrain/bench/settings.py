"""What `dtrain bench collectives` measures: a few numbers, given as bench.KEY=VALUE."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import ConfigError

__all__ = ["DTYPES", "Settings", "parse"]

DTYPES = ("float32", "bfloat16", "float16", "uint8")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A sweep. Bytes are those of the whole buffer, as nccl-tests counts them; M is 10^6.

    ``seconds``: a row ends after this long, or after ``iterations``. ``link_mbit``: the rate of each rank's link, 0 if
    it is not known. ``transport``: "torch", or "mpi" for the ops of `comm`.
    """

    ops: tuple[str, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
    min_bytes: int = 4000
    max_bytes: int = 16_000_000
    factor: int = 4
    iterations: int = 20
    seconds: float = 3.0
    warmup: int = 2
    dtype: str = "float32"
    link_mbit: float = 0.0
    transport: str = "torch"

    def sizes(self) -> list[int]:
        """Bytes of each row of one op, the largest included.

        >>> Settings(min_bytes=1000, max_bytes=10000, factor=4).sizes()
        [1000, 4000, 10000]
        """
        found, size = [], self.min_bytes
        while size < self.max_bytes:
            found.append(size)
            size *= self.factor
        return [*found, self.max_bytes]

    def write(self, folder: Path) -> None:
        """For the ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """What `write` wrote."""
        found = json.loads((folder / "bench.json").read_text())
        return cls(**{**found, "ops": tuple(found["ops"])})


def parse(words: Sequence[str], known_ops: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings, and the words that are not about them.

    Raises:
        ConfigError: an unknown key (with the nearest one), an unknown op, a value that cannot be.
    """
    values: dict[str, object] = {}
    others = []
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for word in words:
        if not word.startswith("bench."):
            others.append(word)
            continue
        key, equals, value = word.removeprefix("bench.").partition("=")
        if key not in fields or not equals:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean bench.{near[0]}?" if near else ""
            raise ConfigError(f"there is no setting bench.{key}{hint} (there are {', '.join(fields)})")
        values[key] = _value(key, value)
    settings = dataclasses.replace(Settings(), **values)  # type: ignore[arg-type]  # checked by _value
    _check(settings, known_ops)
    return settings, others


def _value(key: str, text: str) -> object:
    if key == "ops":
        return tuple(text.strip("[]").split(","))
    if key in ("dtype", "transport"):
        return text
    number = text.upper().rstrip("B")
    unit = number[-1:] if number[-1:] in ("K", "M", "G") else ""
    try:
        found = float(number.removesuffix(unit)) * UNITS[unit]
    except ValueError as error:
        raise ConfigError(f"bench.{key} must be a number such as 4000 or 16M, but is {text!r}") from error
    return found if key in ("seconds", "link_mbit") else int(found)


def _check(settings: Settings, known_ops: Sequence[str]) -> None:
    for op in settings.ops:
        if op not in known_ops:
            near = difflib.get_close_matches(op, known_ops, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no op {op}{hint} (there are {', '.join(known_ops)})")
    if settings.transport == "mpi" and any(not op.startswith("comm.") for op in settings.ops):
        raise ConfigError("bench.transport=mpi carries the ops of comm: bench.ops=comm.all_reduce,comm.all_gather")
    if settings.dtype not in DTYPES:
        raise ConfigError(f"bench.dtype is {settings.dtype}; choose one of {', '.join(DTYPES)}")
    if settings.transport not in ("torch", "mpi"):
        raise ConfigError(f"bench.transport is {settings.transport}; choose torch or mpi")
    if not 0 < settings.min_bytes <= settings.max_bytes:
        raise ConfigError(f"bench.min_bytes={settings.min_bytes} and bench.max_bytes={settings.max_bytes} are no range")
    if settings.factor < 2 or settings.iterations < 1 or settings.warmup < 0 or settings.seconds <= 0:
        raise ConfigError("bench.factor is at least 2, bench.iterations at least 1, bench.seconds more than 0")
