"""Whether tests on a GPU were asked for, and whether they can run: ``python -m tests.gpu.card`` says why not.

`DEVICE` is "cuda" but for whoever works on these tests without a card.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

DEVICE = os.environ.get("DTRAIN_GPU_TESTS_DEVICE", "cuda")
NO_CARD = 77
"""The exit code; as in other test suites, of what could not be tested."""
OLDEST = (2, 11)
NEEDED = ("torch", "numpy", "pytest", "pytest_timeout", "hypothesis")


def asked(config: pytest.Config) -> bool:
    """Whether the command names these tests, by ``-m gpu`` or their folder."""
    expression = str(config.getoption("markexpr", ""))
    named = any("tests/gpu" in argument for argument in config.args)
    return ("gpu" in expression and "not" not in expression) or named


def why_not() -> str:
    """Why no test can run on `DEVICE`, in one line; "" if they can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"this needs {', '.join(missing)}, which {sys.executable} has not installed"
    if DEVICE != "cuda":
        return ""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        return f"torch is {torch.__version__}; tests on a GPU need {'.'.join(map(str, OLDEST))} or newer"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA, so nothing was tested on a GPU"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device, so nothing was tested on a GPU"
    return ""


def main() -> int:
    """Say why not, or what is there."""
    reason = why_not()
    if reason:
        print(reason, file=sys.stderr)
        return NO_CARD
    import torch

    name = torch.cuda.get_device_name(0) if DEVICE == "cuda" else DEVICE
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
