"""environment.json: where and with what a run was computed, so that it can be reproduced."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys

__all__ = ["KEPT", "NOT_KEPT", "record"]

PACKAGES = ("dtrain", "torch", "deepspeed", "numpy", "hydra-core", "omegaconf", "safetensors", "tensorboard", "mpi4py")
_SETTINGS = {
    "CUBLAS": "WORKSPACE_CONFIG",
    "CUDA": "DEVICE_ORDER VISIBLE_DEVICES",
    "DTRAIN": "CLUSTER COMPILE",
    "GLOO": "DEVICE_TRANSPORT SOCKET_IFNAME",
    "MKL": "NUM_THREADS",
    "NCCL": (
        "ALGO BUFFSIZE CROSS_NIC DEBUG DEBUG_SUBSYS IB_DISABLE IB_GID_INDEX IB_HCA IB_TC IB_TIMEOUT "
        "MAX_NCHANNELS MIN_NCHANNELS NET NET_GDR_LEVEL NSOCKS_PERTHREAD NTHREADS P2P_DISABLE P2P_LEVEL PROTO "
        "SHM_DISABLE SOCKET_FAMILY SOCKET_IFNAME SOCKET_NTHREADS"
    ),
    "OMP": "DYNAMIC NUM_THREADS PLACES PROC_BIND SCHEDULE WAIT_POLICY",
    "PYTORCH": "CUDA_ALLOC_CONF",
    "SLURM": (
        "ARRAY_JOB_ID ARRAY_TASK_ID CLUSTER_NAME CPUS_ON_NODE CPUS_PER_TASK CPU_BIND DISTRIBUTION "
        "GPUS_ON_NODE HINT JOB_ACCOUNT JOB_ID JOB_NAME JOB_NODELIST JOB_NUM_NODES JOB_PARTITION JOB_QOS "
        "LOCALID MEM_PER_CPU MEM_PER_NODE NNODES NODEID NTASKS NTASKS_PER_NODE PROCID RESTART_COUNT STEP_ID "
        "STEP_TASKS_PER_NODE TASKS_PER_NODE THREADS_PER_CORE"
    ),
    "TORCH": "COMPILE_DISABLE CPP_LOG_LEVEL DISTRIBUTED_DEBUG LOGS NCCL_ASYNC_ERROR_HANDLING NCCL_BLOCKING_WAIT",
    "TORCHDYNAMO": "DISABLE",
    "TORCHELASTIC": "MAX_RESTARTS RESTART_COUNT",
    "UCX": "NET_DEVICES TLS",
}
KEPT = frozenset(f"{family}_{name}" for family, names in _SETTINGS.items() for name in names.split())
"""Variables whose values are recorded: known settings by name, never a pattern that keys and passwords could match."""
NOT_KEPT = "(not kept)"


def record() -> dict[str, object]:
    """Versions, machine, devices, git revision and selected environment variables; plain JSON values.

    It imports no package and starts no GPU context, so it may run in the launching process. ``git`` is that of the
    current folder: {"revision", "dirty"}, dirty if tracked files were changed; None without git or a repository.
    """
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "devices": _devices(),
        "git": _git(),
        "command": [_without_values(word) for word in sys.orig_argv],
        "folder": os.getcwd(),
        "environment": {name: os.environ[name] for name in sorted(KEPT & os.environ.keys())},
    }


def _without_values(word: str) -> str:
    """A word of the command line, without its value if it sets variables of the ranks.

    >>> _without_values("launcher.environment=[HF_TOKEN=hf_x]"), _without_values("train.steps=3")
    ('launcher.environment=(not kept)', 'train.steps=3')
    """
    key, equals, _ = word.partition("=")
    return f"{key}={NOT_KEPT}" if equals and key.lstrip("+").startswith("launcher.environment") else word


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _devices() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return listed.splitlines() if listed else []


def _git() -> dict[str, object] | None:
    revision = _output("git", "rev-parse", "HEAD")
    if not revision:
        return None
    return {"revision": revision, "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))}


def _output(*command: str) -> str:
    """What a command prints, without its last newline; empty if it is not installed, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
