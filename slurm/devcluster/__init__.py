"""A real Slurm cluster of several hosts on one Linux machine, with links of a given bandwidth and latency."""

from __future__ import annotations

from dtrain.slurm.devcluster.cluster import Cluster, cut, devcluster, down, host_command, login_command, shape, up
from dtrain.slurm.devcluster.state import BadRequest, ClusterError, Facts, named, running

__all__ = [
    "BadRequest",
    "Cluster",
    "ClusterError",
    "Facts",
    "cut",
    "devcluster",
    "down",
    "host_command",
    "login_command",
    "named",
    "running",
    "shape",
    "up",
]
