"""Which keys of ``launcher`` each launcher takes. One that it would leave unused is refused: it was meant.

``nodes`` of the local launcher is 1, ``wait`` and ``snapshot`` ask there for what is so anyway.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping

from dtrain.train.config.schema import LauncherConfig

__all__ = ["ALLOCATED", "TAKES", "refused"]

ALLOCATED = "DTRAIN_ALLOCATED"
"""Set where `enter_launcher` has asked Slurm for the nodes around this process: then the keys for that were used."""

_ALL = frozenset(field.name for field in dataclasses.fields(LauncherConfig))
_MPI = frozenset({"mpirun", "hosts", "mpi_args"})
_COMMON = frozenset({
    "name", "workers", "nodes", "max_restarts", "grace_seconds", "threads_per_worker", "hang_seconds", "wait",
    "environment", "snapshot", "interface", "python",
})  # fmt: skip
ALLOCATION = frozenset({
    "minutes", "gpus_per_node", "memory_gib", "partition", "account", "qos", "constraint", "exclude", "reservation",
})  # fmt: skip
"""Of these ``launcher=mpi`` asks Slurm for nodes, where it does."""

TAKES = {"local": _COMMON, "mpi": _COMMON | _MPI | {"address", "port"} | ALLOCATION, "slurm": _ALL - _MPI}


def refused(config: LauncherConfig, variables: Mapping[str, str] = os.environ) -> Iterator[str]:
    """What is set, and the launcher has no use for: each with its value and who has."""
    takes = TAKES.get(config.name, _ALL)
    allocates = config.nodes > 1 and not config.hosts and "SLURM_JOB_ID" not in variables
    for field in dataclasses.fields(LauncherConfig):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value == default:
            continue
        key = f"launcher.{field.name}={_shown(value)}"
        if field.name not in takes:
            others = " or ".join(name for name, keys in TAKES.items() if field.name in keys)
            yield f"{key} means nothing to launcher={config.name}: leave it out, or take launcher={others}"
        elif config.name == "mpi" and field.name in ALLOCATION and not (allocates or ALLOCATED in variables):
            yield (
                f"{key} is for the nodes that launcher=mpi asks Slurm for, and it asks for none where the ranks run on "
                "launcher.hosts, on one node or in an allocation: leave it out"
            )
    if config.name == "local" and config.nodes > 1:
        yield f"launcher=local has one node, but launcher.nodes={config.nodes}: take launcher=slurm or mpi"
    if not config.container and (config.container_args or config.container_runtime != "pyxis"):
        yield "launcher.container_args and launcher.container_runtime are for a launcher.container, and there is none"


def _shown(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
