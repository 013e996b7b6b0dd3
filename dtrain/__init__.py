"""dtrain: train one model on many machines whose links are too slow, too busy or too unreliable for data parallelism.

The names below are what user code imports, beside those of `dtrain.compress`, `dtrain.outer`, `dtrain.plans`,
`dtrain.rounds`, `dtrain.aggregators` and `dtrain.testing`. They are loaded when they are first used, so that ``import
dtrain`` costs nothing and users of the hooks alone never import hydra or DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.comm.adapters.grad_scaler import GradScaler
    from dtrain.comm.attach import attach
    from dtrain.comm.methods.co2 import co2
    from dtrain.comm.methods.delayed_diloco import delayed_diloco, eager_diloco
    from dtrain.comm.methods.dgc import dgc
    from dtrain.comm.methods.diloco import diloco
    from dtrain.comm.methods.every_step import every_step
    from dtrain.comm.methods.fedkseed import fedkseed
    from dtrain.comm.methods.ferret import ferret
    from dtrain.comm.methods.local_sgd import local_sgd
    from dtrain.comm.methods.local_update import local_update
    from dtrain.comm.methods.muloco import muloco
    from dtrain.comm.methods.one_byte import one_byte
    from dtrain.comm.methods.onebit_adam import onebit_adam
    from dtrain.comm.methods.post_local_sgd import post_local_sgd
    from dtrain.comm.methods.scaffold import fedavg_m, scaffold_m
    from dtrain.comm.methods.slowmo import slowmo
    from dtrain.comm.methods.sparta import sparta
    from dtrain.comm.methods.streaming_diloco import streaming_diloco
    from dtrain.comm.runtime.membership.members import Members
    from dtrain.comm.transports.simulate import simulate
    from dtrain.loading import load
    from dtrain.training import Trainer

__version__ = "0.1.0"

__all__ = [
    "GradScaler",
    "Members",
    "Trainer",
    "__version__",
    "attach",
    "co2",
    "delayed_diloco",
    "dgc",
    "diloco",
    "eager_diloco",
    "every_step",
    "fedavg_m",
    "fedkseed",
    "ferret",
    "load",
    "local_sgd",
    "local_update",
    "muloco",
    "one_byte",
    "onebit_adam",
    "post_local_sgd",
    "scaffold_m",
    "simulate",
    "slowmo",
    "sparta",
    "streaming_diloco",
]

_HOME = {
    "GradScaler": "dtrain.comm.adapters.grad_scaler",
    "Members": "dtrain.comm.runtime.membership.members",
    "Trainer": "dtrain.training",
    "attach": "dtrain.comm.attach",
    "co2": "dtrain.comm.methods.co2",
    "delayed_diloco": "dtrain.comm.methods.delayed_diloco",
    "dgc": "dtrain.comm.methods.dgc",
    "diloco": "dtrain.comm.methods.diloco",
    "eager_diloco": "dtrain.comm.methods.delayed_diloco",
    "every_step": "dtrain.comm.methods.every_step",
    "fedavg_m": "dtrain.comm.methods.scaffold",
    "fedkseed": "dtrain.comm.methods.fedkseed",
    "ferret": "dtrain.comm.methods.ferret",
    "load": "dtrain.loading",
    "local_sgd": "dtrain.comm.methods.local_sgd",
    "local_update": "dtrain.comm.methods.local_update",
    "muloco": "dtrain.comm.methods.muloco",
    "one_byte": "dtrain.comm.methods.one_byte",
    "onebit_adam": "dtrain.comm.methods.onebit_adam",
    "post_local_sgd": "dtrain.comm.methods.post_local_sgd",
    "scaffold_m": "dtrain.comm.methods.scaffold",
    "simulate": "dtrain.comm.transports.simulate",
    "slowmo": "dtrain.comm.methods.slowmo",
    "sparta": "dtrain.comm.methods.sparta",
    "streaming_diloco": "dtrain.comm.methods.streaming_diloco",
}

_PACKAGES = ("aggregators", "compress", "inner", "outer", "plans", "rounds", "testing")
"""Public too, and loaded on first use: aggregators, compressors and feedback, inner optimizers, outer steps, plans,
lengths of rounds, test tools.
"""


def __getattr__(name: str) -> object:
    """Load a public name from its home, once (PEP 562)."""
    if name in _PACKAGES:
        return importlib.import_module(f"dtrain.{name}")
    if name in _HOME:
        value: object = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    from dtrain.renamed import RENAMED

    if new := RENAMED.get(f"dtrain.{name}"):
        # No AttributeError: `from dtrain import ...` would replace its message.
        raise ImportError(f"dtrain.{name} is called {new} now: from {new.rpartition('.')[0]} import {name}")
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
