"""Launcher commands go to the login host of the cluster that `dtrain cluster` has up, so that nobody has to."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

CLUSTER = "DTRAIN_CLUSTER"


def enter_login_host(arguments: Sequence[str]) -> None:
    """Become the same command on the cluster's login host; return if there is no cluster, or if this is its host.

    Raises:
        ConfigError: several clusters are up and DTRAIN_CLUSTER names none.
    """
    if CLUSTER in os.environ and "SLURM_CONF" in os.environ:
        return
    if "SLURM_JOB_ID" in os.environ or not os.path.isdir("/run/dtrain"):
        return
    from dtrain.slurm.devcluster import login_command, running

    if not running():
        return
    command, environment = login_command([sys.executable, "-m", "dtrain", *arguments], os.environ.get(CLUSTER))
    sys.stdout.flush()
    os.execvpe(command[0], command, {**os.environ, **environment})
