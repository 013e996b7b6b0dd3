"""Moves launcher commands to where they have to run: a cluster's login host, or an allocation of nodes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError
from dtrain.launchers.environment import ALLOCATED, CLUSTER
from dtrain.launchers.inherited_environment import become, handed_on

if TYPE_CHECKING:
    from dtrain.launchers.launcher import Launcher


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


def enter_launcher(launcher: Launcher, arguments: Sequence[str], *, dry_run: bool = False) -> None:
    """Become the same command where the launcher can work; return if that is here, without the variables of any job.

    The checks, which build the user's model, and what starts here must not count as ranks of a job around them.

    Raises:
        ConfigError: it needs nodes, none are named, and there is no Slurm to ask for them.
    """
    if not dry_run:
        if launcher.login_host:
            enter_login_host(arguments)
        options = launcher.allocation(os.environ)
        if options is not None:
            _enter_allocation(launcher, options, arguments)
    defaults = {name: value for name, value in os.environ.items() if name.startswith("SBATCH_")}
    become({**defaults, **handed_on(os.environ, launcher.keeps)})


def _enter_allocation(launcher: Launcher, options: Sequence[str], arguments: Sequence[str]) -> None:
    if shutil.which("salloc") is None:
        raise ConfigError(
            f"launcher={launcher.name} has launcher.nodes={launcher.nodes}, but nobody says which: name them "
            "(launcher.hosts=[a,b]), or run this where Slurm is"
        )
    sys.stdout.flush()
    command = ["salloc", "--quiet", *options, sys.executable, "-m", "dtrain", *arguments]
    os.execvpe(command[0], command, {**os.environ, ALLOCATED: "1"})
