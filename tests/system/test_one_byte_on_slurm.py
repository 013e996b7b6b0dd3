"""Machines under one_byte that are Slurm jobs of their own: one is killed, and another comes with later weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.slurm.devcluster import Cluster
from tests.programs.hosts import store
from tests.programs.machine import Asked, come_and_go
from tests.system.conftest import NAME

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(300)]


def test_survivors_and_newcomers_stay_equal_at_every_step(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record holds the digest of all weights after its step; the replay compares them too."""
    monkeypatch.setenv("DTRAIN_CLUSTER", NAME)
    with store(NAME) as address:
        base = Asked(
            str(tmp_path / "run"), address, machines=4, samples=1, verify_every=0, transformer=(16, 1, 2), save_at=20,
            patience=10.0, timeout=600.0,
        )  # fmt: skip
        run = come_and_go(base, kill_at=12, begin_at=30)
    whole = run.records["machine0"]
    assert len(whole) == 60 and all(each.digest == run.replayed for each in run.machines.values())
    for name, records in run.records.items():
        assert records == whole[-len(records) :], name
    assert 30 <= run.machines["newcomer"].began <= 40
    crowds = [len(record.step.workers) for record in whole]
    assert crowds[0] == crowds[-1] == 4 and crowds[29] == 3
