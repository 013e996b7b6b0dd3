"""What hydra is asked for: dtrain's folder of YAML files, the schema, and the choices of each group.

All of it is the same for every command line of a process, so hydra, which copies its whole search path for each
answer, is asked once: as long as the same launchers are registered, whose keys are part of the schema.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from dtrain.launchers import registry
from dtrain.launchers.launcher import Launcher
from dtrain.train.config.schema import LAUNCHER_DEFAULTS, Config, composable

__all__ = ["folder", "groups_of", "own_groups", "own_options", "store_schema"]

Launchers = tuple[type[Launcher], ...]


def folder() -> Path:
    """The folder of the YAML files: ``configs/`` of the checkout, or its copy in an installed wheel."""
    return Path(__file__).resolve().parents[2] / "configs"


def store_schema() -> None:
    """Register with hydra the schema, and the launchers that have no YAML file."""
    _store_schema(_launchers())


def groups_of(loader: Any) -> list[str]:
    """The groups of a loader's search path."""
    return [group for group in loader.list_groups("") if not group.startswith("hydra")]


def own_groups() -> list[str]:
    """Those of dtrain's folder. Hydra must be initialized with it, and with no other."""
    return list(_own_groups(_launchers()))


def own_options(group: str) -> list[str]:
    """The choices of a group of dtrain's folder. Hydra must be initialized with it, and with no other."""
    return list(_own_options(group, _launchers()))


def _launchers() -> Launchers:
    return tuple(map(registry.launcher_class, registry.names()))


@functools.lru_cache(maxsize=1)  # hydra keeps what was stored last
def _store_schema(launchers: Launchers) -> None:
    store, schema = ConfigStore.instance(), composable(Config)
    store.store(name="schema", node=schema)
    for name in registry.names():
        if not (folder() / "launcher" / f"{name}.yaml").is_file():
            defaults = {key.name: key.default for key in fields(cast(Any, registry.launcher_class(name)))}
            common = cast(Any, schema)().launcher
            changed = {key: value for key, value in defaults.items() if key == "name" or value != getattr(common, key)}
            store.store(group="launcher", name=name, node={**changed, **LAUNCHER_DEFAULTS})


@functools.lru_cache(maxsize=8)
def _own_groups(launchers: Launchers) -> list[str]:
    return groups_of(GlobalHydra.instance().config_loader())


@functools.lru_cache(maxsize=64)
def _own_options(group: str, launchers: Launchers) -> list[str]:
    return list(GlobalHydra.instance().config_loader().get_group_options(group))
