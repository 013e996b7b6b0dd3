"""From a command line to one frozen ``Config``, and between ``Config`` and YAML.

hydra composes the YAML files of ``configs/`` by the choices of the command line. dtrain parses keys and values itself:
hydra suggests no nearest key, its grammar rejects most paths as text, and it requires ``+`` before a keyword that a
target takes but its YAML file does not list.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from dtrain.errors import ConfigError
from dtrain.launchers import registry
from dtrain.launchers.launcher import Launcher
from dtrain.renamed import CHOICES, RENAMED
from dtrain.train.config import targets
from dtrain.train.config.choices import folder, groups_of, own_groups, own_options, store_schema
from dtrain.train.config.files import mapping_of, words_of
from dtrain.train.config.schema import SECTIONS, Config, composable, is_section, types_of
from dtrain.train.config.suggestions import keys_of, unknown
from dtrain.train.config.words import Kind, Word, read, value_of
from dtrain.train.config.words import alternatives as alternatives_of

OPEN = ("model", "data", "sync", "optim.inner")
"""Sections that are ``_target_`` mappings: their keys are those that the target takes."""

MISSING = "???"
"""How OmegaConf writes a value that has no default."""

_T = TypeVar("_T")


def compose(words: Sequence[str] = (), *, name: str = "") -> Config:
    """The configuration that a command line names: ``compose(["@exp.yaml", "engine=zero2", "train.steps=50"])``.

    A word is ``group=choice``, ``key=value``, ``@FILE`` (the settings of a YAML file: see `dtrain.train.config.files`)
    or ``@FOLDER`` (custom choices: ``FOLDER/sync/mine.yaml`` is ``sync=mine``). Later words win.

    An empty ``run.dir`` becomes ``runs/YYYY-mm-dd/HH-MM-SS-<name>``, a folder that does not exist yet
    (`run_folder.made` resolves races); an empty ``name`` is the sync's.

    Raises:
        ConfigError: an unknown key or choice (with the nearest valid one), a value of the wrong type, a syntax error.
    """
    return compose_named(words, name=name)[0]


def compose_named(words: Sequence[str], *, name: str = "") -> tuple[Config, bool]:
    """As `compose`, and whether the words set ``run.dir``."""
    config, sync = _composed(words)
    named = bool(config.run.dir)
    config = config if named else _with_default_folder(config, name or sync)
    try:
        str(Path(config.run.dir).absolute()).encode()
    except UnicodeEncodeError as error:  # the current folder's name
        where = str(Path(config.run.dir).absolute())
        raise ConfigError(
            f"run.dir={where!a} is not UTF-8, in which everything is written down: go elsewhere"
        ) from error
    return config, named


def _composed(words: Sequence[str]) -> tuple[Config, str]:
    """The configuration, whose ``run.dir`` may be empty, and the name of its sync."""
    with _hydra(words) as composition:
        composed, sync = composition.applied(), composition.sync()
    config = _at_home(_frozen(composed))
    for section in OPEN:
        targets.check(section_of(config, section), section)
    return config, sync


def alternatives(words: Sequence[str]) -> list[list[str]]:
    """The words that each word of a sweep expands to: one, or several for ``key=a,b,c``.

    Raises:
        ConfigError: a word that cannot be read.
    """
    with _hydra(words, sweeps=True) as composition:
        return [composition.alternatives(word) for word in words]


def section_of(config: Config, dotted: str) -> Mapping[str, object]:
    """One of the ``OPEN`` sections by its dotted key."""
    section: object = config
    for name in dotted.split("."):
        section = getattr(section, name)
    return cast(Mapping[str, object], section)


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key included; ``load`` reads it back to an equal ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.create(cast("dict[str, object]", _literal(dataclasses.asdict(config)))))


def commented(config: Config) -> str:
    """The configuration as YAML in comments, to go with a script."""
    return "".join(f"# {line}\n" for line in ["configuration:", *to_yaml(config).splitlines()])


def load(path: str | Path) -> Config:
    """The configuration that ``to_yaml`` wrote.

    Raises:
        ConfigError: the file is missing, is not YAML, lacks a section, has keys or values unknown to this version, or
            contains an interpolation, which would be resolved in the reader's environment.
    """
    stored = mapping_of(path)
    stored = OmegaConf.create(cast("dict[str, object]", _renamed(OmegaConf.to_container(stored, resolve=False))))
    plain = cast(dict[str, object], OmegaConf.to_container(stored, resolve=False))
    if looked_up := next(_looked_up(plain), None):
        raise ConfigError(f"{path}: {looked_up} would be looked up here, and a stored configuration holds values only")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(composable(Config)), stored)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_explained(error) or str(error).splitlines()[0]}") from error
    config = _frozen(cast(DictConfig, merged), strict=False)
    # dtrain writes every section; a missing one would silently become the defaults.
    if lost := [name for name in SECTIONS if not isinstance(plain.get(name), dict)]:
        raise ConfigError(
            f"{path} is damaged: it lacks {', '.join(lost)}; put a copy back (config-N.yaml beside it are earlier ones)"
        )
    return config


def _renamed(value: object) -> object:
    """Replace targets of earlier versions by their current names."""
    if isinstance(value, dict):
        return {
            key: RENAMED.get(inner, inner) if key == "_target_" and isinstance(inner, str) else _renamed(inner)
            for key, inner in value.items()
        }
    return [_renamed(inner) for inner in value] if isinstance(value, list) else value


def _looked_up(value: object) -> Iterator[str]:
    """The texts that contain an unescaped interpolation; keys cannot."""
    if isinstance(value, str):
        if re.search(r"(?<!\\)(?:\\\\)*\$\{", value):
            yield repr(value)
        return
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _looked_up(inner)


def dotted_keys(config: Config) -> list[str]:
    """Every valid key of the composed configuration, sections included: ``train``, ``train.steps``, ..."""
    return list(keys_of(dataclasses.asdict(config)))


# ---- words ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hydra(words: Sequence[str], *, sweeps: bool = False) -> Iterator[_Composition]:
    """Parse a command line against dtrain's folder of YAML files and the folders that it names."""
    files = [word[1:] for word in words if word.startswith("@")]
    folders = [str(path) for path in map(_own_folder, files) if path is not None]
    store_schema()
    with initialize_config_dir(config_dir=str(folder()), version_base="1.3", job_name="dtrain"):
        loader: Any = GlobalHydra.instance().config_loader()
        ours = own_groups()
        if folders:
            _distinct(folders, {group: set(loader.get_group_options(group)) for group in ours})
        for path in folders:
            loader.get_search_path().prepend("a folder of one's own", f"file://{path}", anchor="schema")
            loader.repository.initialize_sources(loader.get_search_path())
        yield _Composition(words, loader, tuple(folders), set(ours), sweeps=sweeps)


def _of_the_sync(word: Word) -> Word:
    """``compress=int8`` means ``compress@sync.compress=int8``."""
    short = word.key == "compress" and word.package is None and not word.removes
    return replace(word, package="sync.compress") if short else word


def _own_folder(text: str) -> Path | None:
    """The folder that ``@TEXT`` names; None where that is a file."""
    path = Path(os.path.expanduser(text))
    return path.absolute() if text and path.is_dir() else None


def _distinct(folders: Sequence[str], ours: Mapping[str, set[str]]) -> None:
    """Raise ``ConfigError`` where a folder redefines one of dtrain's choices: one of the two would be ignored."""
    for path in map(Path, folders):
        for group, options in ours.items():
            for option in sorted(options & {file.stem for file in (path / group).glob("*.yaml")}):
                raise ConfigError(
                    f"{path / group / option}.yaml is called like dtrain's own {group}={option}; rename it"
                )


class _Composition:
    """A parsed command line: its choices, and its values in the order in which they are applied."""

    def __init__(
        self, words: Sequence[str], loader: Any, folders: tuple[str, ...], ours: set[str], *, sweeps: bool
    ) -> None:
        self._loader, self._folders, self._ours = loader, folders, ours
        self._groups = groups_of(loader) if folders else sorted(ours)
        self._read: list[Word] = []
        for text in words:
            if not text.startswith("@"):
                self._read.append(_of_the_sync(read(text)))
            elif _own_folder(text[1:]) is None:
                self._read += map(_of_the_sync, words_of(os.path.expanduser(text[1:])))
        choices = {at: word for at, word in enumerate(self._read) if self._is_choice(word)}
        self._choices = {at: word for at, word in choices.items() if not self._within_later(at, choices)}
        if sweeps:  # the kinds of keys are the same for every swept choice
            first = {at: self._choice_values(word) for at, word in self._choices.items()}
            self._choices = {at: replace(word, text=first[at][0]) for at, word in self._choices.items()}
        chosen = tuple(map(self._chosen, self._choices.values()))
        self._composed, self._known = _run_hydra(chosen, folders, registry.names())

    def sync(self) -> str:
        """The name of the sync, followed by that of the compressor if a word chooses one."""
        compress = [word.text for word in self._choices.values() if word.package == "sync.compress"]
        return "-".join([self._known["sync"], *compress[-1:]])

    def applied(self) -> DictConfig:
        """The configuration with all values, those of ``_target_`` first, as they decide which other keys there are."""
        composed = copy.deepcopy(self._composed)
        values = [(at, word) for at, word in enumerate(self._read) if not (self._is_choice(word) or self._undone(at))]
        last: dict[str, int] = {word.key: at for at, word in values if not word.removes}
        for of_targets in (True, False):
            for at, word in values:
                if _names_target(word) is of_targets and (not word.from_file or last.get(word.key, at) == at):
                    with _with_origin(word):
                        _apply(composed, word)
                    self._choose_again(composed, at, word)
        return composed

    def alternatives(self, text: str) -> list[str]:
        """See `alternatives`."""
        if text.startswith("@"):
            return [text]
        word = _of_the_sync(read(text))
        if self._is_choice(word):
            return [f"{text.partition('=')[0]}={value}" for value in self._choice_values(word)]
        if word.key == "run.dir":
            return [text]  # the sweep's own folder, in which each run has one
        kind, _ = _kind(word.key, _plain(self._composed))
        values = alternatives_of(word, kind, self._loader)
        return [text] if len(values) < 2 else [f"{text.partition('=')[0]}={value}" for value in values]

    def _choice_values(self, word: Word) -> list[str]:
        return alternatives_of(word, "value", self._loader) if "," in word.text or "(" in word.text else [word.text]

    def _within_later(self, at: int, choices: Mapping[int, Word]) -> bool:
        """Whether a file's choice lies within a section that a later word chooses again."""
        place = choices[at].package or choices[at].key
        later = (word.package or word.key for other, word in choices.items() if other > at)
        return choices[at].from_file and any(place == key or place.startswith(f"{key}.") for key in later)

    def _is_choice(self, word: Word) -> bool:
        if word.removes or (word.from_file and not isinstance(word.value, str)):
            return False
        return word.package is not None or (word.key in self._groups and not word.text.lstrip().startswith("{"))

    def _chosen(self, word: Word) -> str:
        """A choice as a hydra override."""
        name, value = word.key, word.text
        place = f"{word.origin}: " if word.origin else ""
        if name not in self._groups:
            near = targets.hint(targets.closest(name, self._groups))
            raise ConfigError(f"{place}there is no group {name}{near} (there are {', '.join(self._groups)})")
        options = self._loader.get_group_options(name) if self._folders else own_options(name)
        if value not in options:
            if now := CHOICES.get(f"{name}={value}"):
                raise ConfigError(f"{place}{word.given}: this choice is written {now} now")
            if word.text.lstrip()[:1] == "{":
                raise ConfigError(f"{place}{word.given}: a mapping is the key's own value: {word.package}={word.text}")
            if word.text.lstrip()[:1] != "[" and ("," in word.text or "(" in word.text):
                written = f"{word.key}={word.value}" if word.from_file else word.given
                command = f"a run for each is started by: dtrain train -m {written}"
                raise ConfigError(f"{place}{word.given}: a run has one {name}; {command}")
            near = targets.hint(targets.closest(str(value), options))
            raise ConfigError(f"{place}{word.given}: there is no such choice{near} (there are {', '.join(options)})")
        # Every group of dtrain's has a default choice already: only others, and other places in a sync, need the "+".
        package = f"@{word.package}" if word.package is not None else ""
        added = name not in self._ours or (package.startswith("@sync.") and package != "@sync.compress")
        return f"{'+' if added else ''}{name}{package}={value}"

    def _sets(self, word: Word) -> list[str]:
        """The keys that a choice sets; a ``_target_`` mapping counts as one."""
        content = self._loader.repository.load_config(f"{word.key}/{word.text}").config
        plain = cast(dict[object, object], OmegaConf.to_container(content, resolve=False))
        place = word.package if word.package is not None else word.key
        return [place] if "_target_" in plain else [f"{place}.{key}" for key in plain]

    def _undone(self, at: int) -> bool:
        """Whether a later choice overrides this setting of a file."""
        word = self._read[at]
        later = [key for other, choice in self._choices.items() if other > at for key in self._sets(choice)]
        return word.from_file and any(word.key == key or word.key.startswith(key + ".") for key in later)

    def _choose_again(self, composed: DictConfig, at: int, word: Word) -> None:
        """Reapply what a later choice sets within a mapping that a file has just replaced."""
        for other, choice in self._choices.items() if word.from_file else ():
            for key in self._sets(choice) if other > at else ():
                if key.startswith(word.key + "."):
                    chosen = OmegaConf.to_container(OmegaConf.select(self._composed, key), resolve=False)
                    OmegaConf.update(composed, key, chosen, merge=False, force_add=True)


def _names_target(word: Word) -> bool:
    return word.key.endswith("_target_") or (isinstance(word.value, Mapping) and "_target_" in word.value)


@contextlib.contextmanager
def _with_origin(word: Word) -> Iterator[None]:
    """Prefix errors about a file's setting with the file's name."""
    try:
        yield
    except ConfigError as error:
        if not word.origin:
            raise
        raise ConfigError(f"{word.origin}: {error}") from error


def _apply(composed: DictConfig, word: Word) -> None:
    """Set or remove the key of a word. The key exists, or is a keyword of the target of its mapping."""
    key, chosen = word.key, _plain(composed)
    node, last = _around(word, chosen), key.rpartition(".")[2]
    exists = _has(node, last)
    if isinstance(node, list):
        whole = key.rpartition(".")[0]
        raise ConfigError(f"{key}: a list is set as a whole, as in {whole}=[{','.join(map(str, node))}]")
    if word.removes:
        if not exists:
            raise unknown(key, chosen)
        if not _open(key) or key in OPEN:
            raise ConfigError(f"{word.given}: {key} cannot be removed; give it another value: {key}=VALUE")
        with open_dict(composed):
            del OmegaConf.select(composed, key.rpartition(".")[0])[last]
        return
    value = value_of(word, *_kind(key, chosen))
    if key in OPEN and not isinstance(value, Mapping):
        shown = targets.shown(value)
        raise ConfigError(f"{key} must be a mapping with _target_, but is {shown}; give it one: {key}._target_=VALUE")
    if isinstance(value, Mapping) and not _open(key):
        # It is merged into a section; its keys must be the section's.
        section = cast(Mapping[str, object], node)[last]
        for inner in value:
            if isinstance(section, dict) and str(inner) not in section:
                near = targets.hint(targets.closest(str(inner), section))
                raise ConfigError(f"there is no key {key}.{inner}{near} (there are {', '.join(section)})")
    replaces = isinstance(value, Mapping) and "_target_" in value and _open(key)
    try:
        OmegaConf.update(composed, key, value, merge=not replaces, force_add=_open(key))
    except OmegaConfBaseException as error:
        raise ConfigError(_explained(error, key) or f"{key}: {str(error).splitlines()[0]}") from error


def _around(word: Word, chosen: Mapping[str, object]) -> object:
    """The mapping that holds, or may hold, the key of a word.

    Raises:
        ConfigError: there is none, or its target takes no such keyword.
    """
    key = word.key
    *path, last = key.split(".")
    node: object = chosen
    for depth, name in enumerate(path, 1):
        node = _child(node, name) if _has(node, name) else False
        place = ".".join(path[:depth])
        if node is None and _open(place) and last == "_target_" and depth == len(path):
            return {}
        if node is None and _open(place):
            raise ConfigError(f"{key}: {place} is null, so it has no {last}; choose a {place} first")
        if not isinstance(node, dict | list):
            raise unknown(key, chosen)
    if isinstance(node, dict) and node.get("_target_") == MISSING and last != "_target_":
        target = ".".join([*path, "_target_"])
        raise ConfigError(f"{target} has no default: set it, as in {target}=VALUE")
    if isinstance(node, dict) and _open(key) and (last == "_target_" or _has(node, last)):
        return node
    if isinstance(node, dict) and "_target_" in node and not word.removes:
        named, others = targets.keywords_of(targets.locate(node["_target_"], ".".join(path)))
        if last in named or others:
            return node
        raise unknown(key, chosen, list(named), str(node["_target_"]))
    if not _has(node, last):
        raise unknown(key, chosen)
    return node


def _kind(key: str, chosen: Mapping[str, object]) -> tuple[Kind, str | None]:
    """A key's kind and a description of its valid values, from the schema or from the target of its mapping."""
    *path, last = key.split(".")
    if not _open(key):
        hint: Any = Config
        for name in key.split("."):
            hint = types_of(hint).get(name) if is_section(hint) else None
        return ("value", None) if hint is None else (targets.holds_text(hint), targets.expected(hint))
    node: object = chosen
    for name in path:
        node = _child(node, name) if _has(node, name) else None
    target = node.get("_target_") if isinstance(node, dict) else None
    if last == "_target_" or target in (None, MISSING):
        return "unknown", None
    function = targets.locate(target, ".".join(path))
    return targets.kind_of_keyword(function, last), targets.expected(targets.keywords_of(function)[0].get(last))


def _open(key: str) -> bool:
    return any(key == section or key.startswith(section + ".") for section in OPEN)


def _has(node: object, key: str) -> bool:
    if isinstance(node, list):
        return key.isdecimal() and len(key) < 10 and int(key) < len(node)
    return isinstance(node, dict) and key in node


def _child(node: object, key: str) -> object:
    return cast(object, node[int(key)] if isinstance(node, list) else cast(dict[str, object], node)[key])


# ---- composing and freezing ----------------------------------------------------------------------------------------


def _plain(composed: DictConfig) -> dict[str, object]:
    """As nested dictionaries and lists; values that are not set yet are ``MISSING``."""
    plain = cast(dict[str, object], OmegaConf.to_container(composed, resolve=False))
    return {key: _without_nothing(value) for key, value in plain.items() if key != "hydra"}


@functools.lru_cache(maxsize=64)  # takes a tenth of a second, and the runs of a sweep share most choices
def _run_hydra(
    choices: tuple[str, ...], folders: tuple[str, ...], launchers: tuple[str, ...]
) -> tuple[DictConfig, dict[str, str]]:
    """What hydra composes from the choices (cached: do not modify), and the chosen name of each group.

    ``launchers``: all registered ones, as their keys are part of the schema.
    """
    try:
        composed = hydra_compose("config", overrides=list(choices), return_hydra_config=True)
        chosen_names = {str(group): str(name) for group, name in composed.hydra.runtime.choices.items()}
        del composed.hydra
        return composed, chosen_names
    except (HydraException, OmegaConfBaseException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OmegaConfBaseException):
            cause = cause.__cause__
        words = _explained(cause) if isinstance(cause, OmegaConfBaseException) else None
        message, _, _ = " ".join(str(error).split()).partition(" To append to your default list")
        if "'compress@sync.compress'. No match" in message:
            sync = next((choice for choice in reversed(choices) if choice.startswith("sync=")), "the sync")
            words = f"{sync} sends nothing that a compressor could make smaller; leave compress out"
        raise ConfigError(words or message) from error


def _explained(error: OmegaConfBaseException, key: str = "") -> str | None:
    """An OmegaConf error about a known key, reworded: the key, its type, the value given. None for other errors."""
    key = error.full_key or key
    if isinstance(error, GrammarParseError):
        return f"{key}: text with ${{ names another key, as in ${{train.steps}}; for the characters themselves: \\${{"
    hint: Any = Config
    for name in key.split("."):
        if not is_section(hint):
            return None
        hint = types_of(hint).get(name)
    if hint is None:
        return None
    words = targets.expected(hint) or "a section with keys of its own"
    return f"{key} must be {words}, but is {targets.shown(error.value)}"


def _frozen(composed: DictConfig, *, strict: bool = True) -> Config:
    """``strict``: refuse keys that the launcher does not take, else drop them."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key
        if "Missing mandatory value" in str(error):
            raise ConfigError(f"{key} has no default: set it, as in {key}=VALUE") from error
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    values = cast(dict[str, object], plain)
    launcher = _launcher(cast(dict[str, object], values.pop("launcher")), strict=strict)
    return replace(_built(Config, values), launcher=launcher)


def _launcher(values: Mapping[str, object], *, strict: bool) -> Launcher:
    try:
        return registry.made(values, strict=strict)
    except registry.NoLauncher as error:
        name, names = str(values["name"]), registry.names()
        near = targets.hint(targets.closest(name, names))
        raise ConfigError(f"launcher.name is {name}{near} (there are {', '.join(names)})") from error
    except registry.UnusedKeys as error:
        raise ConfigError(str(error)) from error


def _built(cls: type[_T], values: Mapping[str, object]) -> _T:
    """The frozen dataclass from plain values, section by section."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = _built(hints[key], cast(dict[str, object], value))
        else:
            arguments[key] = tuple(plain) if isinstance(plain := _without_nothing(value), list) else plain
    return cls(**arguments)


def _without_nothing(value: object) -> object:
    """``{_target_: null}`` in the YAML file of a group means null (see configs/compress/none.yaml)."""
    if isinstance(value, dict):
        if "_target_" in value and value["_target_"] is None:
            return None
        return {str(key): _without_nothing(inner) for key, inner in value.items()}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value


def _literal(value: object) -> object:
    """Escape text so that OmegaConf reads it back unchanged, not as an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    return [_literal(inner) for inner in value] if isinstance(value, list | tuple) else value


def _at_home(config: Config) -> Config:
    """Expand a leading ``~/`` or ``~user/``, which the shell leaves alone after ``key=``.

    Raises:
        ConfigError: a path of ``run`` names an unknown user.
    """

    def home(value: object) -> object:
        if isinstance(value, str) and re.fullmatch(r"~[\w.-]*(/.*)?", value, re.DOTALL):
            return os.path.expanduser(value)
        if isinstance(value, dict):
            return {key: home(inner) for key, inner in value.items()}
        return [home(inner) for inner in value] if isinstance(value, list) else value

    run = {key: home(value) for key, value in dataclasses.asdict(config.run).items()}
    for key, value in run.items():
        if str(value).startswith("~"):
            raise ConfigError(
                f"run.{key}={value}: there is no such user; for a folder of that name: run.{key}=./{value}"
            )
    paths = [key for key in ("python", "mpirun", "container") if hasattr(config.launcher, key)]
    launcher = {key: home(getattr(config.launcher, key)) for key in paths}
    sections: dict[str, Any] = {key: home(dict(section_of(config, key))) for key in OPEN}
    optim = dataclasses.replace(config.optim, inner=sections.pop("optim.inner"))
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, **cast(Any, run)), optim=optim, **sections,
        launcher=config.launcher.replaced(**launcher),
    )  # fmt: skip


def _with_default_folder(config: Config, sync: str) -> Config:
    now = datetime.datetime.now()
    name = Path("runs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{sync}"
    path, number = name, 1
    while path.exists():  # two runs that start in the same second must not share a folder
        number += 1
        path = name.with_name(f"{name.name}-{number}")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(path)))
