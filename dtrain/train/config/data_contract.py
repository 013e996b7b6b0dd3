"""Check that ``data._target_`` makes a data set that the trainer can use, by its first example.

Data sets are mostly user code, so missing members are reported by name, and exceptions with the line that raised them;
otherwise every worker would fail some steps into the run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.launchers import strict_json
from dtrain.train.config.schema import Config
from dtrain.train.config.targets import instantiate, shown

CONTRACT = (
    'a data set takes split="train" or "validation" and has len(), [i] -> dict[str, Tensor], tokens_per_example (an '
    "integer) and describe() -> dict of what identifies the data (files, sizes, a digest)"
)
MEMBERS = {
    "__len__": "len()",
    "__getitem__": "[i]",
    "tokens_per_example": "tokens_per_example",
    "describe": "describe()",
}

DATA = "data.json"
"""In the run folder: the data set's description at the last launch."""

_T = TypeVar("_T")


def check_data(config: Config) -> tuple[object, dict[str, object]]:
    """The training split and its description.

    Raises:
        ConfigError: it lacks a part of the contract, or raised an exception.
        DataError: from the data set itself; or a split without examples.
    """
    target = str(config.data["_target_"])
    data = _tried(target, "making it", lambda: instantiate(config.data, "data", split="train"))
    lacking = [label for member, label in MEMBERS.items() if not hasattr(data, member)]
    if lacking:
        raise ConfigError(f"data: {target} makes a {type(data).__name__} without {' and '.join(lacking)}; {CONTRACT}")
    _splits(config, target, data)
    tokens = cast(Any, data).tokens_per_example
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConfigError(
            f"data: tokens_per_example of {target} must be an integer of at least 1, but is {shown(tokens)}; give the "
            "number of tokens of an example, or 1 where there are none: tokens per second are counted with it"
        )
    _example(target, data)
    description = _description(target, data)
    check_content(config, data, description)
    return data, description


def check_content(config: Config, data: object, description: Mapping[str, object]) -> None:
    """Have a data set with ``check_content()`` verify all of its content, unless an earlier launch of this run did.

    Raises:
        DataError: its content does not match its description.
    """
    check = getattr(data, "check_content", None)
    if not callable(check):
        return
    try:
        stored = strict_json.read(Path(config.run.dir) / DATA)
    except (OSError, ValueError):
        stored = {}
    names = ("sha256", "modified", "vocab_size")
    if any(name not in stored or stored[name] != description.get(name) for name in names):
        _tried(str(config.data["_target_"]), "check_content()", check)


def _splits(config: Config, target: str, data: object) -> None:
    splits = {"train": data}
    if config.train.evaluation_examples:
        made = _tried(target, "making it", lambda: instantiate(config.data, "data", split="validation"))
        splits["validation"] = made
    for split, examples in splits.items():
        if not hasattr(examples, "__len__"):
            raise ConfigError(f"data: the {split} split of {target} has no len(); {CONTRACT}")
        if not _tried(target, "len()", lambda: len(cast(Any, examples))):  # noqa: B023 - called at once
            raise DataError(f"data: {target} has no example in its {split} split; give it more data")


def _example(target: str, data: object) -> None:
    from torch import Tensor

    from dtrain.train.data.batches import fetch

    batch = _tried(target, "a batch of its example [0]", lambda: cast(object, fetch(cast(Any, data), [0])))
    if not isinstance(batch, Mapping) or not batch:
        kind = type(_tried(target, "[0]", lambda: cast(object, cast(Any, data)[0]))).__name__
        raise ConfigError(f"data: [0] of {target} is a {kind}; return a dict of tensors by name: {CONTRACT}")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ConfigError(f"data: {name!r} in [0] of {target} makes no tensor but a {kind}; {CONTRACT}")


def _description(target: str, data: object) -> dict[str, object]:
    described = _tried(target, "describe()", lambda: cast(object, cast(Any, data).describe()))
    if not isinstance(described, dict):
        raise ConfigError(
            f"data: describe() of {target} must return a dict, but returned {shown(described)}; {CONTRACT}"
        )
    try:
        strict_json.parse(strict_json.dumps(described))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data: describe() of {target} returns what JSON cannot hold: {error}") from error
    return cast(dict[str, object], described)


def _tried(target: str, what: str, call: Callable[[], _T]) -> _T:
    """What a call of the data set's own code returns; its exceptions are reported with the line that raised them."""
    try:
        return call()
    except DtrainError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"data: {what} failed for {target}: {type(error).__name__}: {error}\n"
            f"  at {frame.filename}:{frame.lineno} in {frame.name}"
        ) from error
