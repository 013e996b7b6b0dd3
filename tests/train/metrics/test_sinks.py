"""Sinks of metrics: what was asked for is there before anything is launched, and a resume appends to the same run.

Those of W&B, MLflow and Trackio are tried with the packages themselves, where they are installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from dtrain.errors import ConfigError
from dtrain.train.config import check_resume, compose, load, to_yaml, validate
from dtrain.train.metrics import MetricsWriter
from dtrain.train.metrics.sinks import SINKS, Opening


class Kept:
    """A sink that keeps what it was given."""

    def __init__(self, opening: Opening, rows: list[tuple[int, dict[str, float]]]) -> None:
        self.run_id, self.rows = opening.run_id, rows

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(numbers)))

    def close(self) -> None:
        pass


def write_twice(folder: Path, name: str) -> None:
    """Steps 1 to 4, and as after a resume from step 3, 4 to 6."""
    for first, last in ((1, 5), (4, 7)):
        settings = {"train": {"steps": 6}}
        with MetricsWriter(folder, enabled=True, purge_step=first, sinks=[name], settings=settings) as metrics:
            for step in range(first, last):
                metrics.write({"step": step, "loss": 1.0 / step, "decision": "none"})


def test_every_attempt_of_a_run_has_the_same_id_and_sinks_get_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openings: list[Opening] = []
    rows: list[tuple[int, dict[str, float]]] = []

    def kept(opening: Opening) -> Kept:
        openings.append(opening)
        return Kept(opening, rows)

    monkeypatch.setitem(SINKS, "wandb", ("wandb", kept))
    write_twice(tmp_path, "wandb")
    first, second = openings
    assert first.run_id == second.run_id != "" and (first.purge_step, second.purge_step) == (1, 4)
    assert first.settings == {"train.steps": 6} and [step for step, _ in rows] == [1, 2, 3, 4, 4, 5, 6]
    assert rows[0] == (1, {"loss": 1.0})


def test_a_missing_package_and_a_misspelt_name_are_named_before_anything_is_launched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(SINKS, name, (f"nowhere_{name}", SINKS[name][1]))
    config = compose([f"run.dir={tmp_path / 'x'}", "metrics=[tensorboard,wandb,trakio]"])
    with pytest.raises(ConfigError) as refused:
        validate(config)
    assert "metrics=[wandb] needs nowhere_wandb, which is not installed: pip install 'dtrain[wandb]'" in str(refused)
    assert "metrics has 'trakio'; did you mean trackio? (there are tensorboard, wandb" in str(refused)


def test_metrics_may_change_at_a_resume_and_older_runs_have_none(tmp_path: Path) -> None:
    old = compose([f"run.dir={tmp_path}"])
    check_resume(old, compose([f"run.dir={tmp_path}", "metrics=[]", "run.report=false"]))
    lines = to_yaml(old).splitlines(keepends=True)
    kept = [line for line in lines if line.strip() not in ("metrics:", "- tensorboard", "report: true")]
    assert len(kept) == len(lines) - 3
    (tmp_path / "config.yaml").write_text("".join(kept))
    assert load(tmp_path / "config.yaml") == old


def test_wandb_offline_keeps_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write_twice(tmp_path, "wandb")
    attempts = list((tmp_path / "wandb").glob("offline-run-*"))
    ids = {path.name.rpartition("-")[2] for path in attempts}
    assert attempts and ids == {json.loads((tmp_path / "metrics_runs.json").read_text())["wandb"]}


def test_mlflow_appends_to_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_twice(tmp_path, "mlflow")
    client = mlflow.tracking.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("dtrain").experiment_id])
    assert run.data.params == {"train.steps": "6"} and run.info.status == "FINISHED"
    assert sorted({row.step for row in client.get_metric_history(run.info.run_id, "loss")}) == [1, 2, 3, 4, 5, 6]


def test_trackio_appends_to_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    write_twice(tmp_path / "run", "trackio")
    (run,) = trackio.Api().runs("dtrain")
    assert run.name.endswith(json.loads((tmp_path / "run" / "metrics_runs.json").read_text())["trackio"])
