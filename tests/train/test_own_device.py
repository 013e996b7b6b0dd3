"""Which GPU is a rank's own."""

from __future__ import annotations

import re

import pytest
import torch

from dtrain.errors import ConfigError
from dtrain.train.mesh import own_device


@pytest.mark.parametrize(("gpus", "local_rank", "number"), [(4, 2, 2), (1, 0, 0), (1, 3, 0)])
def test_by_local_rank_or_the_only_one_that_it_is_shown(
    gpus: int, local_rank: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    _pretend(gpus, local_rank, monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device() == torch.device("cuda", number) and chosen == [number]


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(2, 3, monkeypatch)
    words = "local rank 3 has no GPU of its own, there are 2: take fewer launcher.workers"
    with pytest.raises(ConfigError, match=re.escape(words)):
        own_device()


def _pretend(gpus: int, local_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": local_rank, "WORLD_SIZE": 8, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
