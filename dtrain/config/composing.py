"""From a command line to one frozen ``Config``, and between ``Config`` and YAML.

hydra composes the YAML files of ``configs/`` and the overrides. Keys and choices are checked here first, as hydra names
no nearest key, and a keyword that a target takes but its YAML file does not list needs no ``+`` in front.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dtrain.config import targets
from dtrain.config.schema import Config, composable
from dtrain.errors import ConfigError

OPEN = ("model", "data", "sync", "optim.inner")
"""Sections that are ``_target_`` mappings: their keys are those that the target takes."""

MISSING = "???"
"""How OmegaConf writes a value that has no default."""

_T = TypeVar("_T")


def folder() -> Path:
    """The folder of the YAML files: ``configs/`` of the checkout, or its copy in an installed wheel."""
    return Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that a command line names: ``compose(["engine=zero2", "train.steps=50"])``.

    An empty ``run.dir`` is filled in: ``runs/YYYY-mm-dd/HH-MM-SS-<sync>``, a name that is not taken yet.

    Raises:
        ConfigError: an unknown key or choice (with the nearest one there is), a value of another type, a syntax error.
    """
    ConfigStore.instance().store(name="schema", node=composable(Config))
    with initialize_config_dir(config_dir=str(folder()), version_base="1.3", job_name="dtrain"):
        choices, values = _split(overrides)
        composed, given = copy.deepcopy(_run_hydra(tuple(choices))), choices
        # Targets first: they decide which other keys there are.
        for of_targets in (True, False):
            plain = _plain(composed)
            checked = [_checked(v, plain) for v in values if v.key_or_group.endswith("_target_") is of_targets]
            given = [*given, *(word for words in checked for word in words)]
            composed = copy.deepcopy(_run_hydra(tuple(given))) if checked else composed
    sync = str(OmegaConf.select(composed, "hydra.runtime.choices.sync"))
    del composed.hydra
    config = _frozen(composed)
    for section in OPEN:
        targets.check(section_of(config, section), section)
    return config if config.run.dir else _with_default_folder(config, sync)


def section_of(config: Config, dotted: str) -> Mapping[str, object]:
    """One of the ``OPEN`` sections by its dotted key."""
    found: object = config
    for part in dotted.split("."):
        found = getattr(found, part)
    return cast(Mapping[str, object], found)


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key included; ``load`` reads it back to an equal ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def commented(config: Config) -> str:
    """The configuration as YAML in comments, to go with a script."""
    return "".join(f"# {line}\n" for line in ["configuration:", *to_yaml(config).splitlines()])


def load(path: str | Path) -> Config:
    """The configuration that ``to_yaml`` wrote.

    Raises:
        ConfigError: the file is missing, is no YAML, or has keys or values that this version does not know.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a configuration: it is no text ({error})") from error
    try:
        stored = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # PyYAML's errors, without importing PyYAML for their class
        raise ConfigError(f"{path} is not a configuration: {error}") from error
    if not isinstance(stored, DictConfig):
        raise ConfigError(f"{path} is not a configuration: it holds a list, not sections")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(composable(Config)), stored)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_explained(error) or str(error).splitlines()[0]}") from error
    return _frozen(cast(DictConfig, merged))


def dotted_keys(config: Config) -> list[str]:
    """Every valid key of the composed configuration, sections included: ``train``, ``train.steps``, ..."""
    return list(_keys(dataclasses.asdict(config)))


# ---- keys and choices ----------------------------------------------------------------------------------------------


def _split(overrides: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Group choices (checked), and overrides of values."""
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in loader.list_groups("") if not group.startswith("hydra")]
    choices: list[str] = []
    values: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_overrides([text])[0]
        except HydraException as error:
            form = "" if "=" in text else " (an override is written key=value)"
            raise ConfigError(f"cannot read {text!r}{form}: {str(error).splitlines()[0]}") from error
        if override.is_sweep_override():
            raise ConfigError(f"{text}: a key has one value; a list is written {override.key_or_group}=[...]")
        name, value = override.key_or_group, override.value()
        if override.package is None and (name not in groups or isinstance(value, Mapping) or override.is_delete()):
            values.append(override)
            continue
        if name not in groups:
            near = targets.hint(targets.closest(name, groups))
            raise ConfigError(f"there is no group {name}{near} (there are {', '.join(groups)})")
        options = loader.get_group_options(name)
        if value not in options:
            near = targets.hint(targets.closest(str(value), options))
            raise ConfigError(f"{text}: there is no such choice{near} (there are {', '.join(options)})")
        choices.append(text.lstrip("+"))  # every group has a choice already: there is nothing to add
    return choices, values


def _checked(override: Override, chosen: Mapping[str, object]) -> list[str]:
    """The override as hydra takes it; its key is valid: it exists, or the target of the mapping around it takes it."""
    key = override.key_or_group
    *path, last = key.split(".")
    node: object = chosen
    for depth, part in enumerate(path, 1):
        node = _child(node, part) if _has(node, part) else False
        place = ".".join(path[:depth])
        if node is None and _open(place) and last == "_target_" and depth == len(path):
            return ["++" + str(override.input_line).lstrip("+")]
        if node is None and _open(place):
            raise ConfigError(f"{key}: {place} is null, so it has no {last}; choose a {place} first")
        if not isinstance(node, dict | list):
            raise _unknown(key, chosen)
    body = str(override.input_line).lstrip("+")
    if isinstance(node, dict) and node.get("_target_") == MISSING and last != "_target_":
        target = ".".join([*path, "_target_"])
        raise ConfigError(f"{target} has no default: set it, as in {target}=VALUE")
    if _has(node, last):
        return _existing(override, node, body)
    if isinstance(node, dict) and "_target_" in node and not override.is_delete():
        named, others = targets.keywords_of(targets.locate(node["_target_"], ".".join(path)))
        if last in named or others:
            return ["++" + body]
        raise _unknown(key, chosen, [f"{'.'.join(path)}.{name}" for name in named])
    if isinstance(node, dict) and _open(key) and last == "_target_":
        return ["++" + body]
    raise _unknown(key, chosen)


def _existing(override: Override, node: object, body: str) -> list[str]:
    key = override.key_or_group
    if isinstance(node, list):
        whole = key.rpartition(".")[0]
        raise ConfigError(f"{key}: a list is set as a whole, as in {whole}=[{','.join(map(str, node))}]")
    if override.is_delete() and (not _open(key) or key in OPEN):
        raise ConfigError(f"{override.input_line}: {key} cannot be removed; give it another value: {key}=VALUE")
    value = override.value()
    if key in OPEN and value is None:
        raise ConfigError(f"{key} must be a mapping with _target_, but is null; give it one: {key}._target_=VALUE")
    if isinstance(value, Mapping) and "_target_" in value and _open(key) and key not in OPEN:
        return [
            f"~{key}",
            f"++{body}",
        ]  # hydra alone would merge the two
    if isinstance(value, Mapping) and not _open(key):
        # hydra merges a mapping into a section; its keys must be the section's.
        section = cast(Mapping[str, object], node)[key.rpartition(".")[2]]
        for inner in value:
            if isinstance(section, dict) and str(inner) not in section:
                near = targets.hint(targets.closest(str(inner), section))
                raise ConfigError(f"there is no key {key}.{inner}{near} (there are {', '.join(section)})")
    return [body]


def _open(key: str) -> bool:
    return any(key == section or key.startswith(section + ".") for section in OPEN)


def _has(node: object, part: str) -> bool:
    if isinstance(node, list):
        return part.isdigit() and int(part) < len(node)
    return isinstance(node, dict) and part in node


def _child(node: object, part: str) -> object:
    return cast(object, node[int(part)] if isinstance(node, list) else cast(dict[str, object], node)[part])


def _keys(node: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, child in node.items():
        if key == "_target_":
            continue
        yield f"{prefix}{key}"
        if isinstance(child, dict):
            yield from _keys(child, f"{prefix}{key}.")


def _unknown(key: str, chosen: Mapping[str, object], more: Sequence[str] = ()) -> ConfigError:
    keys = [*_keys(chosen), *more]
    near = _nearest(key, keys)
    if near is not None:
        return ConfigError(f"there is no key {key}{targets.hint(near)}")
    section = key.partition(".")[0] + "."
    within = [known for known in keys if known.startswith(section)] or [known for known in keys if "." not in known]
    return ConfigError(f"there is no key {key or 'without a name'} (there are {', '.join(within)})")


def _nearest(key: str, keys: Sequence[str]) -> str | None:
    """The key that was probably meant: the same name in another section, or one spelt like it in the same section."""
    section, _, last = key.rpartition(".")
    ends = {known.rpartition(".")[2]: known for known in reversed(keys)}
    if last in ends:
        return ends[last]
    if section in keys:
        siblings = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == section}
        near = siblings.get(targets.closest(last, siblings) or "")
    else:
        near = targets.closest(key, keys)
    return near or ends.get(targets.closest(last, ends) or "")


# ---- composing and freezing ----------------------------------------------------------------------------------------


def _plain(composed: DictConfig) -> dict[str, object]:
    """As nested dictionaries and lists, in which one can look for any key; what has no value yet is ``MISSING``."""
    plain = cast(dict[str, object], OmegaConf.to_container(composed, resolve=False))
    return {key: _without_nothing(value) for key, value in plain.items() if key != "hydra"}


@functools.lru_cache(maxsize=64)  # it takes a tenth of a second, and a sweep says the same words often
def _run_hydra(overrides: tuple[str, ...]) -> DictConfig:
    try:
        return hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OmegaConfBaseException):
            cause = cause.__cause__
        words = _explained(cause) if isinstance(cause, OmegaConfBaseException) else None
        said, _, _ = " ".join(str(error).split()).partition(" To append to your default list")  # which is hydra's own
        raise ConfigError(words or said) from error


def _explained(error: OmegaConfBaseException) -> str | None:
    """An error of OmegaConf about a known key in our words: the key, the type it takes, the value that it was given."""
    key: str = error.full_key or ""
    hint: Any = Config
    for part in key.split("."):
        if not dataclasses.is_dataclass(hint):
            return None
        hint = get_type_hints(cast(type, hint)).get(part)
    if hint is None:
        return None
    words = targets.expected(hint) or "a section with keys of its own"
    return f"{key} must be {words}, but is {targets.shown(error.value)}"


def _frozen(composed: DictConfig) -> Config:
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key
        if "Missing mandatory value" in str(error):
            raise ConfigError(f"{key} has no default: set it, as in {key}=VALUE") from error
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    return _built(Config, cast(dict[str, object], plain))


def _built(cls: type[_T], values: Mapping[str, object]) -> _T:
    """The frozen dataclass from plain values, section by section."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = _built(hints[key], cast(dict[str, object], value))
        else:
            arguments[key] = _without_nothing(value)
    return cls(**arguments)


def _without_nothing(value: object) -> object:
    """``{_target_: null}`` is how a YAML file of a group says null (see configs/compress/none.yaml)."""
    if isinstance(value, dict):
        if "_target_" in value and value["_target_"] is None:
            return None
        return {str(key): _without_nothing(inner) for key, inner in value.items()}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value


def _with_default_folder(config: Config, sync: str) -> Config:
    now = datetime.datetime.now()
    name = Path("runs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{sync}"
    path, number = name, 1
    while path.exists():  # two runs that start in the same second must not share a folder
        number += 1
        path = name.with_name(f"{name.name}-{number}")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(path)))
