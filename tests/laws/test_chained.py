"""Several optimizers over one model, on every engine: stopped and resumed, and what needs whole matrices is refused."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain import inner
from dtrain.testing import WorkerPool
from dtrain.train.engines import EngineOptions, build_engine
from dtrain.train.mesh import build_mesh
from tests import torch_versions
from tests.laws.jobs import ENGINES, run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def sgd_and_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum for matrices, AdamW for vectors."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == whole] for whole in (True, False))
    return inner.chain(torch.optim.SGD(matrices, lr=10 * lr, momentum=0.9), torch.optim.AdamW(vectors, lr=lr))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_stopped_at_any_time_resumes_as_if_it_had_not_been(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str
) -> None:
    target = f"optim.inner={{_target_:{__name__}.{sgd_and_adamw.__name__},lr:0.003}}"
    options = [target, "train.steps=8", "sync.every_steps=4", "sync.compress=null"]
    undisturbed = run(pool, tmp_path / "undisturbed", text, engine, "diloco", *options)
    run(pool, tmp_path / "stopped", text, engine, "diloco", *options, "train.stop_after_steps=5")
    shutil.copytree(tmp_path / "stopped", tmp_path / "again")
    again = run(pool, tmp_path / "again", text, engine, "diloco", *options)
    assert again.losses == undisturbed.losses and again.digest == undisturbed.digest
    assert undisturbed.losses[8] < undisturbed.losses[1]


def refusal_of(engine: str, *, alone: bool) -> str:
    """What an engine that cuts matrices says to a Muon that knows nothing of pieces."""

    class DerivedMuon(torch.optim.Muon):
        """By another name."""

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=not alone))

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == whole] for whole in (True, False))
        muon = DerivedMuon(matrices, lr=0.01)
        return muon if alone else inner.chain(muon, torch.optim.AdamW(vectors))

    options = EngineOptions(
        precision="fp32", activation_checkpointing=False, bucket_mib=1, clip_norm=1.0, microbatches=1, microbatch_size=4
    )
    with pytest.raises(ValueError, match="orthogonalizes whole matrices") as caught:
        build_engine(engine, model, optimizer, build_mesh(1, 2), options)
    return str(caught.value)


@torch_versions.MUON
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_muon_that_knows_nothing_of_pieces_is_refused_where_matrices_are_cut(
    pool: WorkerPool, engine: str, alone: bool
) -> None:
    for message in pool.run(functools.partial(refusal_of, alone=alone), engine, world=2):
        assert message.endswith(
            "give dtrain.inner.muon(model), which assembles each on one rank, or use DistributedDataParallel"
        )
        assert message.startswith(f"{__name__}.DerivedMuon orthogonalizes")
