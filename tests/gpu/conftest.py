"""Tests on one CUDA card: selected by ``-m gpu`` (`make gpu`), left out otherwise, and never passed without a card."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from dtrain.testing import WorkerPool
from tests.gpu.card import DEVICE, NO_CARD, asked, why_not
from tests.gpu.jobs import between_ranks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    here = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    for item in here:
        item.add_marker("gpu")
        item.add_marker(pytest.mark.timeout(300))  # contexts, NCCL and Triton take seconds to begin
        item.add_marker(pytest.mark.filterwarnings("default"))  # what torch says about a card differs by card and torch
    if here and not asked(config):
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("gpu") for item in session.items) and (reason := why_not()):
        pytest.exit(reason, returncode=NO_CARD)


@pytest.fixture
def device() -> torch.device:
    """The card's, with its number."""
    return torch.empty(0, device=DEVICE).device


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Processes that share the card."""
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def nccl_between_ranks(workers: WorkerPool) -> str:
    """What happened when two ranks on one card formed a group of NCCL: "" if it works."""
    return between_ranks(workers, 2)


@pytest.fixture(scope="session")
def backend(nccl_between_ranks: str) -> str:
    """For several ranks on the card: NCCL if it works, else gloo."""
    return "gloo" if nccl_between_ranks or DEVICE == "cpu" else "nccl"


@pytest.fixture
def training() -> None:
    """Skips what needs the packages of ``dtrain train`` where they are not installed."""
    for module in ("hydra", "omegaconf", "yaml", "rich", "safetensors", "tensorboard"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed here: pip install 'dtrain[train]'")
