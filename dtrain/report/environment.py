"""environment.json: where and with what a run was made, so that it can be made again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys

__all__ = ["record"]

PACKAGES = ("dtrain", "torch", "deepspeed", "numpy", "hydra-core", "omegaconf", "safetensors", "tensorboard", "mpi4py")
# Only these, and never all: an environment often holds keys and passwords.
PREFIXES = ("NCCL_", "GLOO_", "OMP_", "SLURM_", "TORCH")


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
        "command": list(sys.orig_argv),
        "folder": os.getcwd(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
