"""Launcher commands go where they have to run by themselves: a cluster's login host, an allocation of nodes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from dtrain.errors import ConfigError
from dtrain.launchers.environment import CLUSTER
from dtrain.launchers.inherited_environment import become, handed_on
from dtrain.train.config.launcher_keys import ALLOCATED

if TYPE_CHECKING:
    from dtrain.launchers.inherited_environment import Kind
    from dtrain.train.config.schema import LauncherConfig


def enter_login_host(arguments: Sequence[str]) -> None:
    """Become the same command on the cluster's login host; return if there is no cluster, or if this is its host.

    Raises:
        ConfigError: several clusters are up and DTRAIN_CLUSTER names none.
    """
    if CLUSTER in os.environ and "SLURM_CONF" in os.environ:
        return
    if "SLURM_JOB_ID" in os.environ or not os.path.isdir("/run/dtrain"):
        return
    from dtrain.cli.cluster import cluster_errors
    from dtrain.slurm.devcluster import login_command, running

    if not running():
        return
    with cluster_errors():
        command, environment = login_command([sys.executable, "-m", "dtrain", *arguments], os.environ.get(CLUSTER))
    sys.stdout.flush()
    os.execvpe(command[0], command, {**os.environ, **environment})


def enter_launcher(config: LauncherConfig, arguments: Sequence[str], *, dry_run: bool = False) -> None:
    """Become the same command where ``config``'s launcher can work; return if that is here, and then out of any job.

    What builds a user's model here to check it, and what starts here, is no rank of the job that this may run in.
    Slurm: the login host. MPI over several nodes that nobody has named: an allocation of them, by ``salloc``.

    Raises:
        ConfigError: MPI over several nodes, and neither their names nor Slurm.
    """
    if not dry_run:
        _move(config, arguments)
    if config.name in ("local", "slurm", "mpi"):  # any other name is refused later
        asked = {name: value for name, value in os.environ.items() if name.startswith("SBATCH_")}
        become({**asked, **handed_on(os.environ, cast("Kind", config.name))})


def _move(config: LauncherConfig, arguments: Sequence[str]) -> None:
    if config.name == "slurm":
        enter_login_host(arguments)
    if config.name != "mpi" or config.nodes == 1 or config.hosts or "SLURM_JOB_ID" in os.environ:
        return
    enter_login_host(arguments)
    if shutil.which("salloc") is None:
        raise ConfigError(
            f"launcher=mpi has launcher.nodes={config.nodes}, but nobody says which: name them (launcher.hosts=[a,b]), "
            "or run this where Slurm is"
        )
    wanted = {
        "nodes": config.nodes, "ntasks-per-node": config.workers // config.nodes, "time": config.minutes,
        "cpus-per-task": config.threads_per_worker, "partition": config.partition, "account": config.account,
        "qos": config.qos, "constraint": config.constraint, "gpus-per-node": config.gpus_per_node,
        "exclude": config.exclude, "reservation": config.reservation,
        "mem": f"{config.memory_gib}G" if config.memory_gib else "",
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in wanted.items() if value]
    sys.stdout.flush()
    command = ["salloc", "--quiet", *options, sys.executable, "-m", "dtrain", *arguments]
    os.execvpe(command[0], command, {**os.environ, ALLOCATED: "1"})
