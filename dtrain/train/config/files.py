"""YAML files: a stored configuration, and those that a command line names: ``dtrain train @exp.yaml train.steps=50``.

A file is checked before it is used: aliases that expand to too many values, and unbounded nesting, are refused. Its
settings are applied key by key, as words are:

    sync: diloco                 a choice of a group
    train: {steps: 50}           or train.steps: 50
    sync.every_steps: 50
    model:                       a mapping with _target_ stands for the whole section, as in a run's config.yaml
      _target_: mine.Model
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

from dtrain.errors import ConfigError
from dtrain.nearest import closest, hint
from dtrain.train.config.words import Word, huge_integer

__all__ = ["mapping_of", "words_of"]

MOST_BYTES = 1 << 20
MOST_NODES = 20_000
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RESOLVER = re.compile(r"\$\{[^}]*?:")


def mapping_of(path: str | Path, what: str = "configuration") -> DictConfig:
    """The mapping in a YAML file, interpolations as they stand.

    Raises:
        ConfigError: the file is missing, too large, no YAML, or holds no mapping.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        meant = hint(_beside(Path(path))) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"cannot read the {what} {path}: {getattr(error, 'strerror', error)}{meant}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path} is not a {what}: it is larger than {MOST_BYTES >> 20} MiB")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a {what}: it is no text ({error})") from error
    try:
        _bound(yaml.compose(text, Loader=LOADER))
        stored = OmegaConf.load(io.StringIO(text))
        if huge := huge_integer(OmegaConf.to_container(stored, resolve=False)):
            raise ValueError(f"{huge} is no number for a configuration: integers have at most 64 bits")
    except RecursionError as error:
        raise ConfigError(f"{path} is not a {what}: its brackets go too deep") from error
    except Exception as error:  # PyYAML's errors, OmegaConf's, and what YAML's own constructors raise
        raise ConfigError(f"{path} is not a {what}: {error}") from error
    if not isinstance(stored, DictConfig):
        raise ConfigError(f"{path} is not a {what}: it holds a list, not sections")
    return stored


def _beside(path: Path) -> str | None:
    """The file in the same folder whose name is most like that of ``path``, if any is."""
    try:
        names = [file.name for file in path.parent.iterdir() if file.is_file()]
    except OSError:
        return None
    nearest = closest(path.name, names)
    return None if nearest is None else str(path.with_name(nearest))


def words_of(path: str) -> list[Word]:
    """The settings in the file of ``@PATH`` as words, in order.

    Raises:
        ConfigError: as `mapping_of`; a key that is no text, or hydra syntax that is written differently here.
    """
    stored = mapping_of(path, "configuration file")
    try:
        plain = cast(dict[object, object], OmegaConf.to_container(stored, resolve=False))
    except Exception as error:
        raise ConfigError(f"{path} is not a configuration file: {error}") from error
    words = list(_flat(plain, "", path))
    for word in words:
        resolver = RESOLVER.search(repr(word.value))
        if resolver:
            raise ConfigError(
                f"{path}: {word.key} has {resolver[0]}...}}, which would be looked up on this machine; a file names "
                "other keys alone, as in ${train.steps}: give the value on the command line"
            )
    return words


def _flat(node: Mapping[object, object], prefix: str, path: str) -> Iterator[Word]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if not isinstance(name, str) or "=" in key or not key.strip():
            raise ConfigError(f"{path}: {key!r} is no key; keys are names, as in train.steps")
        if key == "defaults":
            raise ConfigError(f"{path}: there is no defaults list; choose a group by its name, as in sync: diloco")
        if isinstance(value, dict) and value and "_target_" not in value:
            yield from _flat(value, f"{key}.", path)
            continue
        plain, _, package = key.partition("@")
        text = value if isinstance(value, str) else ""
        yield Word(f"{key}: {value}", "", plain, package or None, text, value, path)


def _bound(root: Any) -> None:
    """Raise ``ValueError`` where aliases expand the document to too many values, or make it contain itself."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: Any) -> int:
        number = id(node)
        if number in inside:
            raise ValueError("it holds itself, by an alias")
        if number not in sizes:
            inside.add(number)
            entries = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [child for entry in entries for child in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[number] = 1 + sum(size(child) for child in children)
            inside.discard(number)
        return sizes[number]

    if root is not None and size(root) > MOST_NODES:
        raise ValueError(f"its aliases stand for more than {MOST_NODES:,} values")
