"""Where rows of metrics go beside metrics.jsonl: the choices of ``metrics=[tensorboard,wandb]``.

    tensorboard   RUN/tensorboard/    event files
    wandb         RUN/wandb/          W&B's offline mode, for `wandb sync`, unless WANDB_MODE says online
    mlflow        RUN/mlflow/         a store of files, unless MLFLOW_TRACKING_URI names a server
    trackio       its own folder      as TRACKIO_DIR and its other variables say

Each is a package of its own, imported by rank 0 when the first row comes. A resumed run appends to the run that it
began: its id is in RUN/metrics_runs.json. Where a tracker cannot take back rows, those between the checkpoint and the
end of the earlier attempt are there twice.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dtrain.launchers.strict_json import json_in

__all__ = ["SINKS", "Opening", "Sink", "opened"]

IDS = "metrics_runs.json"


class Sink(Protocol):
    """Somebody who keeps the numbers of a run. Whatever it raises ends this sink, and no run."""

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Add the numbers of one row."""

    def close(self) -> None:
        """Flush, and end."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a sink is opened with. ``settings``: the configuration as dotted keys. ``purge_step``: at a resume, the
    first step that is trained again. ``run_id``: of this sink, the same for every attempt of the run.
    """

    folder: Path
    settings: Mapping[str, object]
    purge_step: int | None
    run_id: str

    @property
    def name(self) -> str:
        """For people: the last two parts of the folder."""
        return "/".join(self.folder.absolute().parts[-2:])


Open = Callable[[Opening], Sink]


def opened(name: str, folder: Path, settings: Mapping[str, object], purge_step: int | None) -> Sink:
    """The sink called ``name``. Raises ``ImportError`` without its package, and what the package raises."""
    _, open_ = SINKS[name]
    ids = json_in(folder / IDS)
    known = {str(key): str(value) for key, value in ids.items()} if isinstance(ids, dict) else {}
    run_id = known.get(name, "")
    sink = open_(
        Opening(folder=folder, settings=settings, purge_step=purge_step, run_id=run_id or uuid.uuid4().hex[:16])
    )
    now = str(getattr(sink, "run_id", "")) or run_id
    if now != run_id:
        (folder / IDS).write_text(json.dumps({**known, name: now}, indent=1) + "\n")
    return sink


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


class _TensorBoard:
    def __init__(self, events: Any) -> None:
        self._events = events

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


def _tensorboard(opening: Opening) -> Sink:
    """It hides what an earlier attempt wrote from ``purge_step`` on."""
    # Only now: the import takes seconds, and the other ranks never need it.
    from torch.utils.tensorboard import SummaryWriter

    return _TensorBoard(
        SummaryWriter(str(opening.folder / "tensorboard"), purge_step=opening.purge_step, flush_secs=10)
    )


# ---- W&B -----------------------------------------------------------------------------------------------------------


class _Wandb:
    def __init__(self, run: Any, run_id: str) -> None:
        self._run, self.run_id = run, run_id

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


def _wandb(opening: Opening) -> Sink:
    """The step is a metric of its own, by which plots are drawn: W&B's own counter never goes back."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "dtrain"), name=opening.name, id=opening.run_id, resume="allow",
        dir=str(opening.folder), mode=os.environ.get("WANDB_MODE", "offline"),
        config=dict(opening.settings), settings=wandb.Settings(silent=True),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    return _Wandb(run, opening.run_id)


# ---- MLflow --------------------------------------------------------------------------------------------------------


class _MLflow:
    def __init__(self, client: Any, run_id: str, entity: Any) -> None:
        self._client, self.run_id, self._metric = client, run_id, entity

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(1000 * _now())
        self._client.log_batch(
            self.run_id, metrics=[self._metric(name, value, now, step) for name, value in numbers.items()]
        )

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


def _mlflow(opening: Opening) -> Sink:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    address = os.environ.get("MLFLOW_TRACKING_URI") or (opening.folder.absolute() / "mlflow").as_uri()
    client = MlflowClient(tracking_uri=address)
    try:
        client.update_run(opening.run_id, status="RUNNING")
        return _MLflow(client, opening.run_id, Metric)
    except MlflowException:  # there is none of this id: this is the first attempt
        pass
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dtrain")
    experiment = client.get_experiment_by_name(name)
    where = client.create_experiment(name) if experiment is None else experiment.experiment_id
    run_id = client.create_run(where, run_name=opening.name).info.run_id
    settings = [Param(key, str(value)[:500]) for key, value in opening.settings.items()]
    for first in range(0, len(settings), 100):  # what a batch may hold
        client.log_batch(run_id, params=settings[first : first + 100])
    return _MLflow(client, run_id, Metric)


def _now() -> float:
    import time

    return time.time()


# ---- Trackio -------------------------------------------------------------------------------------------------------


class _Trackio:
    def __init__(self, run: Any, run_id: str) -> None:
        self._run, self.run_id = run, run_id

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _trackio(opening: Opening) -> Sink:
    """Trackio resumes by the run's name, so that the name holds the id."""
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "dtrain"), name=f"{opening.name.replace('/', '-')}-{opening.run_id}",
        resume="allow", config={key: str(value) for key, value in opening.settings.items()}, embed=False,
    )  # fmt: skip
    return _Trackio(run, opening.run_id)


SINKS: Mapping[str, tuple[str, Open]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
    "trackio": ("trackio", _trackio),
}
"""By the names of ``metrics``: the module that must be installed, and what opens the sink."""
