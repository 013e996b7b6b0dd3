"""What a run leaves behind beside its checkpoints: the exported model, summary.json and outcome.json. Rank 0 writes."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dtrain.launchers import strict_json
from dtrain.report.run_figures import TRAFFIC
from dtrain.report.summary import Summary
from dtrain.train.checkpoint import export
from dtrain.train.checkpoint.folders import write_text_durably

if TYPE_CHECKING:
    from dtrain.comm.transports.meter import Meter
    from dtrain.train.config import Config
    from dtrain.train.mesh import Mesh
    from dtrain.train.setup import Parts
    from dtrain.train.totals import Account

Reason = Literal["finished", "stopped", "signal"]


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: at which step, and why. ``signal``: the number of the signal, or 0.

    ``withheld``: there is no checkpoint of that step, as steps were being skipped when the signal came.
    """

    reason: Reason
    step: int
    signal: int
    withheld: bool = False

    def write(self, folder: Path) -> None:
        record = {
            "reason": self.reason,
            "signal": self.signal or None,
            "step": self.step,
            "withheld": self.withheld,
        }
        write_text_durably(folder / "outcome.json", strict_json.dumps(record))


@dataclass(frozen=True)
class Measured:
    """The figures of a run that only its loop knows. ``loss``: of the last step; None if it made none."""

    loss: float | None
    validation_loss: float | None
    skipped_steps: int


def summarize(config: Config, mesh: Mesh, parts: Parts, account: Account, checkpoint: Path, measured: Measured) -> None:
    """Export ``checkpoint`` and write the summary, which stays as it is where nothing was left to do."""
    folder, attached = Path(config.run.dir), parts.attached
    digest = export(checkpoint, folder / "export" / "model.safetensors")
    path = folder / "summary.json"
    if measured.loss is None and path.exists():
        return
    parameters = sum(torch.Size(shape).numel() for shape in parts.engine.pieces.shapes.values())
    Summary(
        run="/".join(folder.parts[-2:]),
        replicas=mesh.replicas,
        shards=mesh.shards,
        engine=config.engine.name,
        steps=attached.steps,
        seconds=account.seconds,
        skipped_steps=measured.skipped_steps,
        loss=measured.loss,
        validation_loss=measured.validation_loss,
        evaluated="anchor parameters" if "anchor" in attached.state.kinds else "parameters",
        tokens_per_second=account.tokens / account.seconds if account.seconds else None,
        sent_bytes_per_rank=account.sent_bytes,
        dense_bytes_per_rank=dense_bytes(parameters, mesh.replicas, mesh.shards) * attached.steps,
        compute_utilization=account.compute_utilization,
        exposed_fraction=account.exposed_fraction,
        parameters_digest=digest,
    ).write(path)


def write_traffic(folder: Path, rank: int, meters: Sequence[Meter]) -> None:
    """Write traffic/rank-K.json: what this rank sent across the replicate axis, as what, and how. It is for people
    alone, so that a file that cannot be written ends no run.

    What was sent before a resume is "before" on every rank, as many bytes as rank 0 had sent.
    """
    sent: dict[str, dict[str, list[int]]] = {}
    waited: dict[str, float] = {}
    for meter in meters:
        for (axis, label, op), count in list(meter.by.items()):
            if axis == "replicate" and count.bytes:
                sent.setdefault(label, {})[op] = [count.bytes, count.messages]
        waited |= {label: seconds for label, seconds in list(meter.waited.items()) if seconds}
    record = {"rank": rank, "host": socket.gethostname(), "sent": sent, "waited": waited}
    try:
        (folder / TRAFFIC).mkdir(parents=True, exist_ok=True)
        (folder / TRAFFIC / f"rank-{rank}.json").write_text(strict_json.dumps(record))
    except OSError as error:
        warnings.warn(f"{folder / TRAFFIC} was not written: {error}", RuntimeWarning, stacklevel=2)


def dense_bytes(parameters: int, replicas: int, shards: int) -> int:
    """What one rank sends across the replicate axis for one dense fp32 gradient exchange.

    >>> dense_bytes(1000, replicas=2, shards=2)
    2000
    """
    return 2 * (replicas - 1) * 4 * (parameters // shards) // replicas
