"""Replicas that are Slurm jobs of their own: one is killed in the middle of a round, and another one comes later."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.elastic import Asked, store, trained
from dtrain.slurm.devcluster import Cluster
from tests.system.conftest import NAME

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(240)]


def test_training_goes_on_without_a_replica_that_died_and_with_one_that_came(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_CLUSTER", NAME)
    with store(NAME) as address:
        asked = Asked(address, str(tmp_path / "run"), "", seed=1, steps=60, every_steps=5, model=(16, 1, 2), hold_at=38)
        whole = trained(asked, kill_at=22, begin_at=30)
    sizes = whole.replicas["replica0"].sizes
    assert sizes[0] == sizes[-1] == 4 and 3 in sizes[23:38]
    assert len({one.digest for one in whole.replicas.values()}) == 1
    assert 30 < whole.replicas["newcomer"].first_step <= 50
