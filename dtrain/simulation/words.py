"""The words of `dtrain simulate`: what is asked, and which cells it has."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dtrain.comm.clock.failures import Failures, Policy
from dtrain.comm.clock.layouts import ENGINES
from dtrain.comm.clock.network import Network, parsed
from dtrain.comm.clock.speeds import Speeds
from dtrain.comm.clock.step import Step
from dtrain.errors import ConfigError
from dtrain.nearest import closest, hint

__all__ = ["CONFIGURED", "Asked", "Cell", "asked", "cells"]

NETWORK = ("link", "node_link", "rank_link", "sites", "nodes", "ranks", "backend")
CONFIGURED = ("sync", "compress")
"""Groups of dtrain's configuration; their words may also be sync.KEY=VALUE, compress@sync.KEY=CHOICE."""
MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
MOST_CELLS = 2000


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The words that are numbers and names, one value each; sweeps are made of several.

    ``step_seconds``: forward and backward pass of a rank, ``backward`` the share of the latter. ``tokens_per_step``: of
    a replica. ``tokens``: the budget. ``steps``: walked in each cell; 0: enough for three rounds, and some failures.
    ``memory_rate``: bytes per second that encoding and decoding pass, 0: they take no time; ``one_core``: 1 if they
    share a core with training, as on CPUs.
    """

    parameters: float = 0.0
    layers: int = 1
    shapes: str = ""
    step_seconds: float = 0.0
    backward: float = 2 / 3
    optimizer_seconds: float = 0.0
    tokens_per_step: float = 0.0
    tokens: float = 0.0
    steps: int = 0
    engine: str = "module"
    shards: int = 1
    bucket_mib: float = 4.0
    memory_rate: float = 0.0
    one_core: int = 0
    slow: str = ""
    jitter: float = 0.0
    failures_per_hour: float = 0.0
    policy: str = "restart"
    detect_seconds: float = 10.0
    restart_seconds: float = 300.0
    checkpoint_every_steps: int = 100
    checkpoint_seconds: float = 0.0
    seed: int = 0
    order: str = "program"
    calibrate: str = ""

    def step(self) -> Step:
        """The step of a rank. Raises ``ConfigError`` where there is none."""
        if not 0 < self.step_seconds < math.inf:
            raise ConfigError("how long is a step? Give step_seconds=0.8, that of a rank without communication")
        if not 0 <= self.backward <= 1:
            raise ConfigError(f"backward={self.backward}: the backward pass has a share in [0, 1], as a rule 0.67")
        if bool(self.shapes) == bool(self.parameters):
            raise ConfigError(
                "what is the model? Give parameters=1.2b layers=24, or shapes=FILE, a .safetensors file (a run's "
                "export/model.safetensors) or JSON {name: shape}; and not both"
            )
        shapes = _read(Path(self.shapes)) if self.shapes else _even(self.parameters, self.layers)
        return Step.even(shapes, self.step_seconds, backward=self.backward, optimizer=self.optimizer_seconds)

    def speeds(self) -> Speeds:
        """Raises ``ConfigError`` for text that is none."""
        if self.slow and not re.fullmatch(r"(\d+x[\d.]+)(,\d+x[\d.]+)*", self.slow):
            raise ConfigError(f"slow={self.slow}: give RANKSxFACTOR, such as slow=1x1.5 or slow=1x2,10x1.1")
        classes = [part.split("x") for part in self.slow.split(",")] if self.slow else []
        try:
            return Speeds(tuple((int(ranks), float(factor)) for ranks, factor in classes), self.jitter, self.seed)
        except ValueError as error:
            raise ConfigError(f"{error}") from error

    def failures(self) -> Failures | None:
        """Raises ``ConfigError`` for what cannot be."""
        if not self.failures_per_hour:
            return None
        try:
            return Failures(
                self.failures_per_hour, cast(Policy, self.policy), self.detect_seconds, self.restart_seconds,
                self.checkpoint_every_steps, self.checkpoint_seconds, self.seed,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"{error}") from error

    @property
    def data_order(self) -> Literal["program", "data"]:
        """Raises ``ConfigError`` for another word."""
        if self.order not in ("program", "data"):
            raise ConfigError(f"order={self.order}: choose program, as dtrain runs, or data, the ideal of publications")
        return cast(Literal["program", "data"], self.order)


@dataclass(frozen=True)
class Cell:
    """One simulation. ``swept``: the words in which it differs from others. ``configured``: those of the sync."""

    swept: Mapping[str, str]
    asked: Asked
    network: Network
    configured: tuple[str, ...]


def cells(words: Sequence[str]) -> list[Cell]:
    """Every combination of the words that are given several times, or as a range A..B of doublings.

    >>> [cell.network.size for cell in cells(["parameters=1b", "step_seconds=1", "link=1gbit", "nodes=2..16"])]
    [2, 4, 8, 16]

    Raises ``ConfigError`` for words that are none, and for too many cells.
    """
    given: dict[str, list[str]] = {}
    for word in words:
        name, sign, value = word.partition("=")
        _require_known(name, word, sign)
        given.setdefault(name, []).extend(_range(name, value))
    count = math.prod(len(values) for values in given.values())
    if count > MOST_CELLS:
        raise ConfigError(f"{count:,} cells are asked for, and {MOST_CELLS:,} are the most; sweep over fewer words")
    swept = [name for name, values in given.items() if len(values) > 1]
    made = []
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values, strict=True))
        network = [f"{name}={chosen[name]}" for name in NETWORK if name in chosen]
        configured = tuple(f"{name}={value}" for name, value in chosen.items() if _is_configured(name))
        try:
            described = parsed(network)
        except ValueError as error:
            raise ConfigError(f"{error}") from error
        made.append(Cell({name: chosen[name] for name in swept}, asked(chosen), described, configured))
    return made


def asked(chosen: Mapping[str, str]) -> Asked:
    """The words of `Asked` among ``chosen``. Raises ``ConfigError`` for a value that is none."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Asked):
        if field.name in chosen:
            values[field.name] = _value(field.name, chosen[field.name], type(field.default))
    result = Asked(**values)
    if result.engine not in ENGINES:
        raise ConfigError(
            f"engine={result.engine}{hint(closest(result.engine, ENGINES))}; there are {', '.join(ENGINES)}"
        )
    if result.shards < 1 or result.layers < 1 or not result.bucket_mib > 0 or result.steps < 0:
        raise ConfigError("shards, layers and bucket_mib are positive, and steps is not negative")
    return result


def _value(name: str, text: str, kind: type) -> object:
    if kind is str:
        return text
    match = re.fullmatch(r"(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)([kmbgt]?)", text.lower().replace("_", ""))
    number = float(match[1]) * MULTIPLES[match[2]] if match else math.nan
    if math.isnan(number) or number < 0 or (kind is int and number != int(number)):
        raise ConfigError(
            f"{name}={text}: give a {'whole ' if kind is int else ''}number from 0 on, such as 100 or 1.2b"
        )
    return kind(number)


def _require_known(name: str, word: str, sign: str) -> None:
    known = {*NETWORK, *(field.name for field in dataclasses.fields(Asked))}
    if sign and (name in known or _is_configured(name)):
        return
    likeliest = closest(name, {*known, *CONFIGURED})
    raise ConfigError(
        f"{word}: no word of dtrain simulate{hint(likeliest)}; it takes a network (link=100mbit,40ms nodes=4), a "
        "model (parameters=1b layers=24 step_seconds=0.8), and a sync (sync=diloco sync.every_steps=100 compress=int8)"
    )


def _is_configured(name: str) -> bool:
    return re.split(r"[.@]", name.lstrip("+~"))[0] in CONFIGURED


def _range(name: str, text: str) -> Iterator[str]:
    """A range of doublings, the end included."""
    match = re.fullmatch(r"(\d+)([a-z]*)\.\.(\d+)([a-z]*)(,.*)?", text)
    if match is None:
        yield text
        return
    begin, unit, end, end_unit, rest = match.groups()
    scale = {"": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
    if (unit or end_unit) not in scale or end_unit not in scale or not int(begin):
        raise ConfigError(f"{name}={text}: a range is of rates or whole numbers, such as 10mbit..1gbit,40ms or 2..1024")
    now, last = int(begin) * scale[unit or end_unit], int(end) * scale[end_unit]
    if now > last:
        raise ConfigError(f"{name}={text}: the range begins behind its end")
    by_size = sorted(scale.items(), key=lambda item: -item[1])
    while now < last:
        yield _written(now, by_size, bool(end_unit)) + (rest or "")
        now *= 2
    yield _written(last, by_size, bool(end_unit)) + (rest or "")


def _written(number: int, by_size: Sequence[tuple[str, int]], with_unit: bool) -> str:
    if not with_unit:
        return f"{number}"
    unit, scale = next((unit, scale) for unit, scale in by_size if unit and (number % scale == 0 or scale == 10**3))
    return f"{number / scale:g}{unit}"


def _even(parameters: float, layers: int) -> dict[str, tuple[int, ...]]:
    """A matrix in each of ``layers``, near square, with ``parameters`` elements in all."""
    each = max(1, int(parameters / layers))
    columns = max(1, 2 ** round(math.log2(each) / 2))
    return {f"layers.{layer}.weight": (-(-each // columns), columns) for layer in range(layers)}


def _read(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file. Raises ``ConfigError`` for one that holds none."""
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                content = json.loads(file.read(min(length, 1 << 27)))
            found = {name: entry["shape"] for name, entry in content.items() if name != "__metadata__"}
        else:
            found = json.loads(path.read_text())
        return {str(name): tuple(int(size) for size in shape) for name, shape in found.items()}
    except OSError as error:
        raise ConfigError(f"shapes={path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ConfigError(
            f"shapes={path} is no .safetensors file and no JSON of {{name: shape}} ({error}); a run's is "
            "export/model.safetensors"
        ) from error
