"""Machines under one_byte that are Slurm jobs of their own: one is killed, and another comes with later weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.elastic import store
from benchmarks.one_byte import Asked, come_and_go
from dtrain.slurm.devcluster import Cluster
from tests.system.conftest import NAME

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(300)]


def test_survivors_and_newcomers_stay_equal_at_every_step(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record holds the digest of all weights after its step; the replay compares them too."""
    monkeypatch.setenv("DTRAIN_CLUSTER", NAME)
    with store(NAME) as address:
        base = Asked(str(tmp_path / "run"), address, steps=60, model=(16, 1, 2), kill_at=12, save_at=20, begin_at=30)
        run = come_and_go(base)
    whole = run.records["machine0"]
    assert len(whole) == 60 and all(each.digest == run.replayed for each in run.machines.values())
    for name, records in run.records.items():
        assert records == whole[-len(records) :], name
    assert 30 <= run.machines["newcomer"].began <= 40
    crowds = [len(record.step.workers) for record in whole]
    assert crowds[0] == crowds[-1] == 4 and crowds[29] == 3
