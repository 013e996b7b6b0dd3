"""From a configuration to a launcher."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from typing import TYPE_CHECKING, Literal, cast

from dtrain.errors import ConfigError
from dtrain.launchers.inherited_environment import unused
from dtrain.launchers.rendezvous import INTERFACES
from dtrain.train.config.launcher_keys import refused
from dtrain.train.config.schema import LauncherConfig

if TYPE_CHECKING:
    from dtrain.launchers.job import Launcher
    from dtrain.launchers.slurm.launcher import SlurmLauncher

__all__ = ["build_launcher", "check_here", "environment_of", "slurm_launcher"]


def build_launcher(config: LauncherConfig, *, replicas: int = 1) -> Launcher:
    """The launcher that ``config`` names; ``replicas`` is the mesh's, for ``isolate=replica``.

    Raises:
        ConfigError: for what cannot be right wherever it runs, for keys that this launcher has no use for, and for MPI
            without an mpirun.
    """
    if problems := list(refused(config)):
        raise ConfigError("\n".join(problems))
    if config.name == "slurm":
        return slurm_launcher(config, replicas=replicas)
    if config.name == "mpi":
        from dtrain.launchers.background import MpiLauncher
        from dtrain.launchers.mpi import NoMpirun, find_mpirun

        try:
            find_mpirun(config.mpirun or "mpirun")
        except NoMpirun as error:
            raise ConfigError(str(error)) from error
        return MpiLauncher(
            workers=config.workers, mpirun=config.mpirun, hosts=tuple(config.hosts), arguments=tuple(config.mpi_args),
            address=config.address, port=config.port, max_restarts=config.max_restarts,
            grace_seconds=config.grace_seconds, threads_per_worker=config.threads_per_worker,
            hang_seconds=config.hang_seconds, python=config.python, environment=environment_of(config),
        )  # fmt: skip
    from dtrain.launchers.background import LocalLauncher

    check_here(config)
    return LocalLauncher(
        workers=config.workers, max_restarts=config.max_restarts, grace_seconds=config.grace_seconds,
        threads_per_worker=config.threads_per_worker, hang_seconds=config.hang_seconds, python=config.python,
        environment=environment_of(config),
    )  # fmt: skip


def check_here(config: LauncherConfig) -> None:
    """Raise ``ConfigError`` for an interpreter or a network interface that this machine, where the ranks run, lacks."""
    if config.python and shutil.which(config.python) is None:
        raise ConfigError(f"launcher.python={config.python}: there is no such interpreter on this machine")
    there = sorted(name for _, name in socket.if_nameindex())
    missing = [name for name in config.interface.split(",") if name and name not in there]
    if missing:
        raise ConfigError(
            f"launcher.interface={config.interface}: this machine has no network interface {', '.join(missing)}, only "
            f"{', '.join(there)}; leave it out: ranks of one machine meet on its loopback interface"
        )


def slurm_launcher(config: LauncherConfig, *, replicas: int = 1) -> SlurmLauncher:
    """The launcher for Slurm.

    Raises:
        ConfigError: for what cannot be right on any cluster.
    """
    from dtrain.launchers.slurm.launcher import SlurmLauncher
    from dtrain.launchers.slurm.settings import Group, SlurmSettings

    try:
        groups = tuple(Group.parse(text) for text in config.groups)
    except ValueError as error:
        raise ConfigError(f"launcher.groups: {error}") from error
    settings = SlurmSettings(
        nodes=sum(group.nodes for group in groups) or config.nodes,
        workers=sum(group.workers for group in groups) or config.workers,
        minutes=config.minutes, cpus_per_worker=config.threads_per_worker, gpus_per_node=config.gpus_per_node,
        memory_gib=config.memory_gib, partition=config.partition, account=config.account, qos=config.qos,
        constraint=config.constraint, exclude=config.exclude, reservation=config.reservation,
        array_parallel=config.array_parallel, per_node=cast(Literal["srun", "torchrun"], config.per_node),
        replicas=replicas if config.isolate == "replica" else 1, groups=groups, max_restarts=config.max_restarts,
        signal_seconds=config.signal_seconds, hang_seconds=config.hang_seconds, address=config.address,
        port=config.port, interface=config.interface, python=config.python, setup=tuple(config.setup),
        container=config.container,
        container_runtime=cast(Literal["pyxis", "apptainer"], config.container_runtime),
        container_args=tuple(config.container_args), srun_args=tuple(config.srun_args), sbatch=tuple(config.sbatch),
    )  # fmt: skip
    found = settings.problems()
    if found:
        raise ConfigError("\n".join(found))
    for text in unused(os.environ):
        print(f"dtrain: warning: {text}", file=sys.stderr)
    return SlurmLauncher(settings, environment_of(config), snapshot=config.snapshot)


def environment_of(config: LauncherConfig) -> dict[str, str]:
    """``launcher.environment`` as a dictionary, with what ``launcher.interface`` means.

    Raises:
        ConfigError: an entry without ``=``.
    """
    found = dict.fromkeys(INTERFACES, config.interface) if config.interface else {}
    for entry in config.environment:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"launcher.environment: {entry!r} is not NAME=value")
        found[name] = value
    return found
