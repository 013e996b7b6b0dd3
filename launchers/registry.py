"""The launchers by name: the choices of ``launcher``, their keys, and the classes of their jobs.

A launcher is imported when it is first asked for. `register` adds one: its class, or where it is, as "module:Class".
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_type_hints

from dtrain.launchers.job import Facts, Job
from dtrain.launchers.launcher import Launcher

__all__ = [
    "FOREGROUND", "Key", "NoLauncher", "UnusedKeys", "job_class", "keys", "launcher_class", "made", "names", "open_job",
    "register", "unregister",
]  # fmt: skip

FOREGROUND = "foreground"
"""The launcher that job.json names where a command ran its ranks itself."""

_LAUNCHERS: dict[str, str | type[Launcher]] = {
    "local": "dtrain.launchers.background:LocalLauncher",
    "slurm": "dtrain.launchers.slurm.launcher:SlurmLauncher",
    "mpi": "dtrain.launchers.background:MpiLauncher",
}
_FOREGROUND_JOB = "dtrain.launchers.foreground_job:ForegroundJob"


class NoLauncher(ValueError):
    """There is no launcher of this name."""


class UnusedKeys(ValueError):
    """Keys are set that the launcher does not use, although they were meant."""


def register(name: str, launcher: str | type[Launcher]) -> None:
    """Make ``launcher=name`` mean this one, in this process."""
    _LAUNCHERS[name] = launcher


def unregister(name: str) -> None:
    """Forget a launcher."""
    del _LAUNCHERS[name]


def names() -> tuple[str, ...]:
    """All launchers."""
    return tuple(_LAUNCHERS)


def launcher_class(name: str) -> type[Launcher]:
    """The class of a launcher. Raises `NoLauncher`."""
    if name not in _LAUNCHERS:
        raise NoLauncher(f"there is no launcher {name} (there are {', '.join(names())})")
    return cast(type[Launcher], _loaded(_LAUNCHERS[name]))


def job_class(launcher: str) -> type[Job]:
    """The class of the jobs of a launcher, by the name that job.json has."""
    if launcher == FOREGROUND:
        return cast(type[Job], _loaded(_FOREGROUND_JOB))
    # A job of an unknown launcher is looked up as a process of this machine, and so is lost.
    return launcher_class(launcher if launcher in _LAUNCHERS else "local").job_class


def open_job(facts: Facts) -> Job:
    """The job of these facts, whatever launched it."""
    return job_class(facts.launcher)(facts)


@dataclass(frozen=True)
class Key:
    """A key of ``launcher``: its type, its default, and the launchers that take it."""

    type: Any
    default: object
    launchers: tuple[str, ...]


def keys() -> dict[str, Key]:
    """The keys of all launchers, those that all take first. Raises ``TypeError`` where two disagree about one."""
    merged: dict[str, Key] = {}
    for name in names():
        launcher = cast(Any, launcher_class(name))
        hints = get_type_hints(launcher)
        for field in dataclasses.fields(launcher):
            earlier = merged.get(field.name)
            if earlier is not None and earlier.type != hints[field.name]:
                raise TypeError(f"launcher {name} has {field.name} as {hints[field.name]}, others as {earlier.type}")
            if earlier is None:
                merged[field.name] = Key(hints[field.name], field.default, (name,))
            else:
                merged[field.name] = dataclasses.replace(earlier, launchers=(*earlier.launchers, name))
    return merged


def made(values: Mapping[str, object], *, strict: bool = True) -> Launcher:
    """The launcher of these keys; ``name`` says which. Keys that it does not take must have their defaults.

    Unless ``strict`` they may have any value, as earlier versions stored the keys of all launchers.

    Raises:
        NoLauncher: there is none of this name.
        UnusedKeys: each with its value and the launchers that use it.
    """
    name = str(values.get("name", ""))
    launcher, all_keys = launcher_class(name), keys()
    own_keys = {field.name for field in dataclasses.fields(cast(Any, launcher))}
    unused = [
        f"launcher.{key}={_shown(value)} means nothing to launcher={name}: leave it out, or take launcher="
        f"{' or '.join(sorted(all_keys[key].launchers))}"
        for key, value in values.items()
        if key not in own_keys and _value(value) != all_keys[key].default
    ]
    if unused and strict:
        raise UnusedKeys("\n".join(unused))
    return launcher(**{key: _value(value) for key, value in values.items() if key in own_keys})


def _loaded(target: object) -> object:
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _value(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
