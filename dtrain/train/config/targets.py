"""``_target_`` mappings: checked against the signature of what they name, and instantiated, with errors that say where.

hydra does the instantiation. What is added: the dotted key of the mapping that failed, the nearest valid name for one
that does not exist, and the types that the target's annotations ask for.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal, Union, cast

from dtrain.errors import ConfigError, DtrainError
from dtrain.nearest import closest as closest
from dtrain.nearest import hint as hint
from dtrain.renamed import RENAMED

if TYPE_CHECKING:
    from dtrain.train.config.words import Kind

_SIMPLE: dict[object, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    type(None): ((type(None),), "null"),
}
_KINDS = {bool: "a truth value", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}


def shown(value: object) -> str:
    """A value with its kind: ``'abc' (text)``, ``1.5 (a number)``, ``null``."""
    return "null" if value is None else f"{value!r} ({_KINDS.get(type(value), type(value).__name__)})"


def expected(annotation: object) -> str | None:
    """What values a simple annotation admits, in words: 'an integer or null'. None for one that is not simple."""
    if annotation in _SIMPLE:
        return _SIMPLE[annotation][1]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        words = [expected(member) for member in _members(arguments)]
        return None if None in words or not words else " or ".join(cast(list[str], words))
    if origin is tuple and arguments and Ellipsis not in arguments:
        words = [expected(argument) for argument in arguments]
        return None if None in words else f"a list [{', '.join(cast(list[str], words))}]"
    return None


def _members(union: Iterable[object]) -> list[object]:
    """The members that a YAML value can be; a Protocol, which a mapping with a ``_target_`` makes, if there is no other
    but null.
    """
    members = [member for member in union if not _of_torch(member)]
    plain = [member for member in members if not getattr(member, "_is_protocol", False)]
    return plain if {*plain} - {type(None)} else members


def _of_torch(annotation: object) -> bool:
    """Whether it is a class of torch's, as in AdamW's ``lr: float | Tensor``: no configuration holds such an object."""
    return isinstance(annotation, type) and annotation.__module__.partition(".")[0] == "torch"


def admits(annotation: object, value: object) -> bool:
    """Whether a value fits a simple annotation. Annotations that are not simple admit everything."""
    if annotation in _SIMPLE:
        accepted = _SIMPLE[annotation][0]
        return isinstance(value, accepted) and (bool in accepted or not isinstance(value, bool))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(admits(member, value) for member in _members(arguments)) or not expected(annotation)
    if expected(annotation) is not None:  # a tuple of fixed length; YAML has only lists
        fits = isinstance(value, list | tuple) and len(value) == len(arguments)
        return fits and all(map(admits, arguments, cast("list[object]", value)))
    return True


def locate(target: object, where: str) -> Callable[..., object]:
    """The callable that a dotted path names.

    Raises:
        ConfigError: no such module or name (with the nearest one), or not callable.
    """
    if not isinstance(target, str) or not all(name.isidentifier() for name in target.split(".")):
        raise ConfigError(f"{where}._target_ must be the path of a callable, as in torch.optim.AdamW, not {target!r}")
    if target in RENAMED:
        raise ConfigError(f"{where}._target_: {target} is called {RENAMED[target]} now")
    parts = target.split(".")
    resolved: object = None
    for position, name in enumerate(parts):
        prefix = ".".join(parts[:position])
        if position and hasattr(resolved, name):
            resolved = getattr(resolved, name)
            continue
        try:
            resolved = importlib.import_module(".".join(parts[: position + 1]))
        except ModuleNotFoundError as error:
            missing = str(error.name)
            if not target.startswith(missing):
                raise ConfigError(f"{where}._target_: importing {target} needs {missing}, which is missing") from error
            near = hint(_nearest(name, prefix, resolved)) if position else ""
            place = f"in {prefix}" if position else "to import here (is its folder in PYTHONPATH?)"
            raise ConfigError(f"{where}._target_: {target}: there is no {name} {place}{near}") from error
        except Exception as error:  # a module of the user's may raise anything while it is imported
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{where}._target_: importing {target} failed: {what}") from error
    if not callable(resolved):
        raise ConfigError(f"{where}._target_: {target} is a {type(resolved).__name__}, which cannot be called")
    return resolved


def _nearest(name: str, prefix: str, owner: object) -> str | None:
    """The most similar name in a module; for one that has moved, its current path."""
    earlier = {old.rpartition(".")[2]: new for old, new in RENAMED.items() if old.rpartition(".")[0] == prefix}
    near = closest(name, [*_names(owner), *earlier])
    return earlier.get(near, near) if near is not None else None


def _names(owner: object) -> list[str]:
    return [name for name in {*dir(owner), *getattr(owner, "__all__", ())} if not name.startswith("_")]


def holds_text(annotation: object, default: object = inspect.Parameter.empty) -> Kind:
    """The `dtrain.train.config.words.Kind` of a keyword with this annotation; without one, that of its default."""
    if annotation in (object, typing.Any, inspect.Parameter.empty):
        return "text" if isinstance(default, str) else "unknown"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        members = [member for member in _members(arguments) if member is not type(None)]
        kinds, optional = {holds_text(member) for member in members}, type(None) in arguments
        if kinds == {"text"}:
            return "optional text" if optional else "text"
        return kinds.pop() if len(kinds) == 1 else "unknown" if kinds & {"text", "optional text"} else "value"
    if origin is Literal:
        return "text" if all(isinstance(argument, str) for argument in arguments) else "value"
    if (isinstance(annotation, type) and issubclass(annotation, str | PurePath)) or origin is os.PathLike:
        return "text"
    if annotation is os.PathLike:
        return "text"
    of_text = bool(arguments) and {holds_text(argument) for argument in arguments if argument is not ...} == {"text"}
    many = isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)
    return "texts" if many and of_text else "value"


def kind_of_keyword(target: Callable[..., object], name: str) -> Kind:
    """The kind of a callable's keyword; ``unknown`` for one that ``**keywords`` takes."""
    named, _ = keywords_of(target)
    try:
        default = inspect.signature(target).parameters[name].default
    except (ValueError, TypeError, KeyError):
        default = inspect.Parameter.empty
    return holds_text(named.get(name, object), default)


def keywords_of(target: Callable[..., object]) -> tuple[dict[str, object], bool]:
    """The keywords that a callable takes, with their annotations, and whether it takes any other (``**kwargs``)."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (ValueError, TypeError):  # some callables of C extensions show no signature
        return {}, True
    hints: dict[str, object] = {}
    with contextlib.suppress(Exception):  # names under TYPE_CHECKING cannot be resolved: no types are checked then
        hints = typing.get_type_hints(vars(target).get("__init__", target) if isinstance(target, type) else target)
    keywords = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {name: hints.get(name, object) for name in keywords}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def mappings(settings: object, where: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every mapping with a ``_target_`` in a tree of settings, outermost first, with its dotted key."""
    if isinstance(settings, Mapping):
        if "_target_" in settings:
            yield where, settings
        for key, value in settings.items():
            yield from mappings(value, f"{where}.{key}")
    elif isinstance(settings, list | tuple):
        for position, value in enumerate(settings):
            yield from mappings(value, f"{where}.{position}")


def check(settings: Mapping[str, object], where: str) -> None:
    """Refuse names that do not exist, keywords that the targets do not take, and values of the wrong type.

    Raises:
        ConfigError: with the dotted key, what is wrong, and the nearest valid name.
    """
    if "_target_" not in settings:
        raise ConfigError(f"{where} has no _target_: name the callable that makes it, or choose a group: {where}=NAME")
    for place, mapping in mappings(settings, where):
        target = mapping["_target_"]
        named, others = keywords_of(locate(target, place))
        for key, value in mapping.items():
            if key.startswith("_") and key.endswith("_"):
                continue
            if key not in named:
                if others:
                    continue
                near = hint(closest(key, named))
                raise ConfigError(f"{place}.{key}: {target} takes no {key}{near} (it takes {', '.join(named)})")
            if not isinstance(value, Mapping) and not admits(named[key], value):
                words = expected(named[key])
                raise ConfigError(f"{place}.{key} must be {words}, but is {shown(value)}")


def instantiate(settings: Mapping[str, object], where: str = "settings", /, **keywords: object) -> object:
    """Call what ``_target_`` names with the keywords of the mapping and the ones given here, innermost mappings first.

    >>> instantiate({"_target_": "fractions.Fraction", "numerator": 3}, denominator=4)
    Fraction(3, 4)

    Args:
        settings: a mapping with ``_target_``.
        where: its dotted key in the configuration, for errors.
        keywords: passed on untouched (tensors are neither copied nor converted); they win over the mapping.

    Raises:
        ConfigError: the target does not exist, or does not take these values. A DtrainError that it raises passes
        through.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    check(settings, where)
    try:
        # Partial, then called here: hydra would convert and copy the keywords, and with them an optimizer's parameters.
        function = build({**settings, "_partial_": True, "_convert_": "all"})
        return cast(object, function(**keywords))
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, DtrainError):
            raise cause from None
        raise ConfigError(f"{where}: {cause}") from error
    except (TypeError, ValueError, LookupError) as error:  # LookupError: AdamW(betas=[0.9])
        raise ConfigError(
            f"{where}: {settings['_target_']} refused its settings: {error}{_unlike_their_defaults(settings, where)}"
        ) from error


def _unlike_their_defaults(settings: Mapping[str, object], where: str) -> str:
    """Settings whose type is not that of their default: a likely cause of an error in a target without annotations.

    Reported only beside the target's own error, as such a value may be intended.
    """
    with contextlib.suppress(ValueError, TypeError):  # some callables of C extensions show no signature
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(locate(settings["_target_"], where)).parameters.items()
            if type(parameter.default) in _KINDS
        }
        odd = [
            f"{where}.{key} is {shown(settings[key])}, its default is {shown(default)}"
            for key, default in defaults.items()
            if key in settings and not admits(type(default), settings[key])
        ]
        return f" ({'; '.join(odd)})" if odd else ""
    return ""
