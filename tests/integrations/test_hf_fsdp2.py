"""transformers.Trainer with FSDP2 on a mesh of replicas and shards, and a sync in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from dtrain.integrations.hf import sync_with
from dtrain.testing import WorkerPool
from tests.integrations.test_hf import END, METHODS, STOP, launched, llama, losses, made

pytest.importorskip("dtrain.comm.adapters.fsdp_mesh")  # what makes of such a mesh the shard axis alone
pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@contextmanager
def with_fsdp2() -> Iterator[None]:
    """As `launched`, and on CPU, where Accelerate offers no FSDP: it is told that these are GPUs."""
    begin = PartialState.__init__

    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        fresh = not self.initialized
        begin(self, *args, **kwargs)
        if fresh:
            self.distributed_type = DistributedType.MULTI_GPU

    with launched(), mock.patch.dict(os.environ, FSDP2), mock.patch.object(PartialState, "__init__", begun):
        yield


def went_on(name: str, folder: str) -> list[dict[str, Any]]:
    """What a run gives, and one that went on from its checkpoint in the middle of a round, in a new trainer."""
    found = []
    for part in ("whole", "again"):
        with with_fsdp2():
            mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
            trainer = made(
                folder, llama(int(part == "again")), save_steps=STOP, eval_strategy="steps", eval_steps=3,
                parallelism_config=mesh,
            )  # fmt: skip
            synced = sync_with(trainer, METHODS[name])
            trainer.train(resume_from_checkpoint=None if part == "whole" else f"{folder}/checkpoint-{STOP}")
            assert isinstance(trainer.model_wrapped, FSDPModule) and f"{END} steps, 0 skipped" in synced.report
            parameters = [p.full_tensor().detach().flatten().tolist() for p in trainer.model.parameters()]
            evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            found.append({"parameters": parameters, "losses": losses(trainer), "evaluated": evaluated})
    return found


@pytest.mark.parametrize("name", ["int8", "diloco", "streaming"])
def test_it_goes_on_bitwise(pool: WorkerPool, name: str, tmp_path: Path) -> None:
    (whole, again), *others = pool.run(went_on, name, str(tmp_path), world=4)
    assert whole == again and all(other == [whole, again] for other in others)
    assert whole["losses"][-1] < whole["losses"][0] - 0.5
