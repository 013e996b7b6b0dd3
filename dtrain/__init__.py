"""dtrain: train one model on many machines whose links are too slow, too busy or too unreliable for data parallelism.

The names below are what user code imports. They are loaded when they are first used, so that ``import dtrain`` costs
nothing and users of the hooks alone never import hydra or DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.comm.aggregators.mean import mean
    from dtrain.comm.attach import attach
    from dtrain.comm.compressors.cast import cast
    from dtrain.comm.compressors.lowrank import powersgd
    from dtrain.comm.compressors.projection import projection
    from dtrain.comm.compressors.quantize import quantize
    from dtrain.comm.compressors.sign import sign
    from dtrain.comm.compressors.sparse import randk, topk
    from dtrain.comm.compressors.ternary import compeft, terngrad
    from dtrain.comm.drivers.members import Members
    from dtrain.comm.drivers.simulate import simulate
    from dtrain.comm.feedback import econtrol, ef21, error_feedback
    from dtrain.comm.plans.accordion import accordion
    from dtrain.comm.plans.base import after, by_layer
    from dtrain.comm.plans.ef21w import ef21w
    from dtrain.comm.plans.lgreco import lgreco
    from dtrain.comm.schedules.co2 import co2
    from dtrain.comm.schedules.delayed_diloco import delayed_diloco, eager_diloco
    from dtrain.comm.schedules.dgc import dgc
    from dtrain.comm.schedules.diloco import diloco
    from dtrain.comm.schedules.every_step import every_step
    from dtrain.comm.schedules.fedhyper import fedhyper
    from dtrain.comm.schedules.local_sgd import local_sgd
    from dtrain.comm.schedules.local_update import local_update
    from dtrain.comm.schedules.onebit_adam import onebit_adam
    from dtrain.comm.schedules.outer import adam, nesterov, sgd
    from dtrain.comm.schedules.post_local_sgd import post_local_sgd
    from dtrain.comm.schedules.scaffold import fedavg_m, scaffold_m
    from dtrain.comm.schedules.slowmo import slowmo
    from dtrain.comm.schedules.sparta import sparta
    from dtrain.comm.schedules.streaming_diloco import streaming_diloco
    from dtrain.comm.shared_seed.fedkseed import fedkseed
    from dtrain.comm.shared_seed.ferret import ferret
    from dtrain.comm.shared_seed.one_byte import one_byte

__version__ = "0.1.0"

__all__ = [
    "Members",
    "__version__",
    "accordion",
    "adam",
    "after",
    "attach",
    "by_layer",
    "cast",
    "co2",
    "compeft",
    "delayed_diloco",
    "dgc",
    "diloco",
    "eager_diloco",
    "econtrol",
    "ef21",
    "ef21w",
    "error_feedback",
    "every_step",
    "fedavg_m",
    "fedhyper",
    "fedkseed",
    "ferret",
    "lgreco",
    "local_sgd",
    "local_update",
    "mean",
    "nesterov",
    "one_byte",
    "onebit_adam",
    "post_local_sgd",
    "powersgd",
    "projection",
    "quantize",
    "randk",
    "scaffold_m",
    "sgd",
    "sign",
    "simulate",
    "slowmo",
    "sparta",
    "streaming_diloco",
    "terngrad",
    "topk",
]

_HOME = {
    "Members": "dtrain.comm.drivers.members",
    "accordion": "dtrain.comm.plans.accordion",
    "adam": "dtrain.comm.schedules.outer",
    "after": "dtrain.comm.plans.base",
    "attach": "dtrain.comm.attach",
    "by_layer": "dtrain.comm.plans.base",
    "cast": "dtrain.comm.compressors.cast",
    "co2": "dtrain.comm.schedules.co2",
    "compeft": "dtrain.comm.compressors.ternary",
    "delayed_diloco": "dtrain.comm.schedules.delayed_diloco",
    "dgc": "dtrain.comm.schedules.dgc",
    "diloco": "dtrain.comm.schedules.diloco",
    "eager_diloco": "dtrain.comm.schedules.delayed_diloco",
    "econtrol": "dtrain.comm.feedback",
    "ef21": "dtrain.comm.feedback",
    "ef21w": "dtrain.comm.plans.ef21w",
    "error_feedback": "dtrain.comm.feedback",
    "every_step": "dtrain.comm.schedules.every_step",
    "fedavg_m": "dtrain.comm.schedules.scaffold",
    "fedhyper": "dtrain.comm.schedules.fedhyper",
    "fedkseed": "dtrain.comm.shared_seed.fedkseed",
    "ferret": "dtrain.comm.shared_seed.ferret",
    "lgreco": "dtrain.comm.plans.lgreco",
    "local_sgd": "dtrain.comm.schedules.local_sgd",
    "local_update": "dtrain.comm.schedules.local_update",
    "mean": "dtrain.comm.aggregators.mean",
    "nesterov": "dtrain.comm.schedules.outer",
    "one_byte": "dtrain.comm.shared_seed.one_byte",
    "onebit_adam": "dtrain.comm.schedules.onebit_adam",
    "post_local_sgd": "dtrain.comm.schedules.post_local_sgd",
    "powersgd": "dtrain.comm.compressors.lowrank",
    "projection": "dtrain.comm.compressors.projection",
    "quantize": "dtrain.comm.compressors.quantize",
    "randk": "dtrain.comm.compressors.sparse",
    "scaffold_m": "dtrain.comm.schedules.scaffold",
    "sgd": "dtrain.comm.schedules.outer",
    "sign": "dtrain.comm.compressors.sign",
    "simulate": "dtrain.comm.drivers.simulate",
    "slowmo": "dtrain.comm.schedules.slowmo",
    "sparta": "dtrain.comm.schedules.sparta",
    "streaming_diloco": "dtrain.comm.schedules.streaming_diloco",
    "terngrad": "dtrain.comm.compressors.ternary",
    "topk": "dtrain.comm.compressors.sparse",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home, once (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
