"""The doctor on four hosts: every pair is measured, and the host with the slow link is named."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.slurm.devcluster import Cluster

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(120)]


def test_the_host_with_the_slow_link_is_named(
    cluster: Cluster, dtrain: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    cluster.shape("100mbit", "c3")
    try:
        done = dtrain("doctor", "launcher=slurm", "launcher.nodes=4", f"run.dir={tmp_path / 'run'}")
    finally:
        cluster.shape("1gbit", "c3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PROBLEM  c3           bandwidth" in done.stdout and "launcher.exclude=c3" in done.stdout
    assert "4 lead back" in done.stdout
    assert "6 pairs: one way" in done.stdout and done.stdout.count("PROBLEM") == 1
