"""Replicas that are Slurm jobs of their own: one is killed in the middle of a round, and another one comes later."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.slurm.devcluster import Cluster
from tests.programs.hosts import store
from tests.programs.member import Asked, on_hosts
from tests.system.conftest import NAME

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(240)]


def test_training_goes_on_without_a_replica_that_died_and_with_one_that_came(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_CLUSTER", NAME)
    with store(NAME) as address:
        asked = Asked(
            address, str(tmp_path / "run"), "", sync="diloco, 8 bits", steps=60, replicas=4, transformer=(16, 1, 2),
            seed=1, hold_at=38, hold_for=5, patience=10.0, timeout=600.0,
        )  # fmt: skip
        whole = on_hosts(asked, kill_at=22, begin_at=30)
    sizes = whole.replicas["replica0"].sizes
    assert sizes[0] == sizes[-1] == 4 and 3 in sizes[23:38]
    assert len({one.digest for one in whole.replicas.values()}) == 1
    assert 30 < whole.replicas["newcomer"].first_step <= 50
