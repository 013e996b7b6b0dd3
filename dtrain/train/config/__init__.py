"""The configuration of a run: composed once from ``configs/`` and the command line, checked, frozen, then only loaded.

    overrides -> compose -> Config -> validate -> to_yaml -> run.dir/config.yaml -> load (every rank)

``check_resume`` decides whether a stored run may resume under another configuration; ``instantiate`` makes the data
set, the sync and the optimizer from their ``_target_`` mappings, ``build_model`` the model.

Names are loaded on first use, so that commands that compose nothing start without hydra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.train.config.compatibility import MAY_CHANGE_AT_RESUME, Difference, check_resume, differences
    from dtrain.train.config.composition import compose, load, to_yaml
    from dtrain.train.config.model_factory import build_model
    from dtrain.train.config.schema import (
        Config,
        EngineConfig,
        MeshConfig,
        OptimConfig,
        RunConfig,
        Settings,
        TrainConfig,
    )
    from dtrain.train.config.targets import instantiate
    from dtrain.train.config.validation import validate

__all__ = [
    "MAY_CHANGE_AT_RESUME",
    "Config",
    "Difference",
    "EngineConfig",
    "MeshConfig",
    "OptimConfig",
    "RunConfig",
    "Settings",
    "TrainConfig",
    "build_model",
    "check_resume",
    "compose",
    "differences",
    "instantiate",
    "load",
    "to_yaml",
    "validate",
]

_MODULES = {
    "model_factory": ("build_model",),
    "composition": (
        "compose",
        "load",
        "to_yaml",
    ),
    "compatibility": (
        "MAY_CHANGE_AT_RESUME",
        "Difference",
        "check_resume",
        "differences",
    ),
    "schema": (
        "Config",
        "EngineConfig",
        "MeshConfig",
        "OptimConfig",
        "RunConfig",
        "Settings",
        "TrainConfig",
    ),
    "targets": ("instantiate",),
    "validation": ("validate",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
