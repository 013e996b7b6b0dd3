"""Packages that only some commands need, and the extra that installs each."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from dtrain.errors import ConfigError

__all__ = ["OF_LAUNCHING", "OF_TRAINING", "missing", "require"]

OF_TRAINING = ("hydra", "omegaconf", "yaml", "rich", "safetensors", "tensorboard")
"""What the command and the ranks of ``dtrain train`` import."""

OF_LAUNCHING = ("hydra", "omegaconf", "yaml", "safetensors")
"""What `launch`, `bench` and `doctor` import."""

OF_REPORTS = ("matplotlib",)
"""What the pages of runs are drawn with."""

EXTRAS = {
    **dict.fromkeys(OF_TRAINING, "train"), "submitit": "slurm", "jinja2": "slurm", "cloudpickle": "slurm",
    "pyroute2": "cluster", "deepspeed": "zero", "mpi4py": "mpi", "tokenizers": "text", "zstandard": "lossless",
    "transformers": "hf", "peft": "hf", "matplotlib": "report", "wandb": "wandb", "mlflow": "mlflow",
    "trackio": "trackio",
}  # fmt: skip


def require(modules: Sequence[str]) -> None:
    """Raise ``ConfigError``, before anything is started, if one of these is not installed."""
    for module in modules:
        try:
            installed = importlib.util.find_spec(module) is not None
        except (ModuleNotFoundError, ValueError):
            installed = False
        if not installed:
            raise ConfigError(_words(module))


def missing(error: ModuleNotFoundError) -> ConfigError | None:
    """The error for a failed import; None where no extra has the module."""
    module = (error.name or "").partition(".")[0]
    return ConfigError(_words(module)) if module in EXTRAS else None


def _words(module: str) -> str:
    return f"this needs {module}, which is not installed: pip install 'dtrain[{EXTRAS[module]}]'"
