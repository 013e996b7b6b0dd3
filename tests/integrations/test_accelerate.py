"""A loop of Accelerate with a sync in it: nothing in the loop changes, and nothing is lost at a checkpoint."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LinearLR

from dtrain import diloco, every_step, streaming_diloco
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize
from dtrain.integrations.accelerate import FOLDER, Synced
from dtrain.testing import WorkerPool

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

SPECS: dict[str, Sync] = {
    "dense": every_step(),
    "int8": every_step(compress=error_feedback(quantize(bits=8, block=16))),
    "diloco": diloco(every_steps=4),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=2, layers_per_fragment=0),
}
STOP, END, EACH = 6, 12, 2


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 19), nn.Tanh(), nn.Linear(19, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of this rank; a step is made from `EACH` of them."""
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    return [(torch.randn(5, 7, generator=generator), torch.randn(5, 3, generator=generator)) for _ in range(EACH * END)]


@contextmanager
def launched() -> Iterator[None]:
    """As if this process had been started by a launcher, and Accelerate for the first time."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ.update(variables)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        for name in variables:
            del os.environ[name]


def accelerator(kind: str) -> Accelerator:
    """Accelerate takes FSDP2 on GPUs only, and is told here that there are some: native HSDP, two by two."""
    if kind == "ddp":
        return Accelerator(cpu=True, gradient_accumulation_steps=EACH)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(
        cpu=True,
        gradient_accumulation_steps=EACH,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10
        ),
        parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2),
    )


class Loop:
    """A loop as Accelerate's documentation has it."""

    def __init__(self, kind: str, name: str, several: bool, seed: int = 0, **options: Any) -> None:
        self.accelerator = accelerator(kind)
        model = net(seed)
        optimizers: list[torch.optim.Optimizer] = [
            AdamW(model[0].parameters(), lr=0.02),
            SGD(model[2].parameters(), lr=0.1),
        ]
        if not several:
            optimizers = [AdamW(model.parameters(), lr=0.02)]
        schedulers = [LinearLR(optimizer, 1.0, 0.1, END) for optimizer in optimizers]
        self.model, *rest = self.accelerator.prepare(model, *optimizers, *schedulers)
        self.optimizers, self.schedulers = rest[: len(optimizers)], rest[len(optimizers) :]
        self.losses: list[float] = []
        self.synced: Synced | None = None
        if name != "plain":
            given = self.optimizers if several else self.optimizers[0]
            self.synced = Synced(self.accelerator, self.model, given, SPECS[name], **options)

    def train(self, first: int, last: int) -> None:
        for number in range(EACH * first, EACH * last):
            x, y = batches()[number]
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - y).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            self.losses.append(float(loss.detach()))

    def weights(self) -> list[float]:
        return flat(dict(self.model.named_parameters()))


def flat(named: dict[str, Tensor]) -> list[float]:
    return torch.cat([whole(value.detach()).reshape(-1) for value in named.values()]).tolist()


def whole(value: Any) -> Tensor:
    return cast(Tensor, value.full_tensor() if isinstance(value, DTensor) else value)


def gone_on_with(
    kind: str, name: str, several: bool, folder: str
) -> tuple[list[list[float]], list[float], list[float]]:
    """The weights of a run at its end, of one that was loaded in the middle; the outer ones; what was saved."""
    with launched():
        once = Loop(kind, name, several)
        assert once.synced is not None
        once.train(0, STOP)
        once.accelerator.save_state(folder)
        with once.synced.evaluation():
            outer = once.weights()
        saved = flat(once.accelerator.get_state_dict(once.model)) if kind == "ddp" else outer
        once.train(STOP, END)
        once.synced.close()
        ends = [once.weights()]
    with launched():
        again = Loop(kind, name, several, seed=1)
        assert again.synced is not None
        again.accelerator.load_state(folder)
        assert again.synced.sync.steps == STOP
        again.train(STOP, END)
        again.synced.close()
        ends.append(again.weights())
    return ends, outer, saved


def losses_of(kind: str, name: str) -> list[float]:
    with launched():
        loop = Loop(kind, name, several=False)
        loop.train(0, END)
        if loop.synced is not None:
            loop.synced.close()
        return loop.losses


def without_our_part(folder: str, begin_anew: bool) -> str:
    """A checkpoint that Accelerate alone has written, loaded into a loop with a sync."""
    with launched():
        plain = Loop("ddp", "plain", several=False)
        plain.train(0, STOP)
        plain.accelerator.save_state(folder)
        weights = plain.weights()
    with launched():
        loop = Loop("ddp", "diloco", several=False, seed=1, begin_anew=begin_anew)
        try:
            loop.accelerator.load_state(folder)
        except FileNotFoundError as error:
            assert loop.weights() != weights  # nothing was loaded
            return str(error)
        assert loop.weights() == weights and loop.synced is not None and loop.synced.sync.steps == 0
        loop.train(STOP, END)
        loop.synced.close()
        return str(loop.weights())


def not_prepared() -> str:
    with launched():
        model = net()
        try:
            Synced(Accelerator(cpu=True), model, AdamW(model.parameters()), diloco(every_steps=2))
        except ValueError as error:
            return str(error)
        return ""


@pytest.mark.parametrize(
    ("kind", "several", "name"),
    [
        *(("ddp", several, name) for several in (False, True) for name in SPECS),
        *(("fsdp", False, name) for name in SPECS),
    ],
)
def test_a_checkpoint_in_a_round_goes_on_bitwise(pool: WorkerPool, kind: str, several: bool, name: str) -> None:
    world, shards = (2, 1) if kind == "ddp" else (4, 2)
    with tempfile.TemporaryDirectory() as folder:
        (ends, outer, saved), *others = pool.run(gone_on_with, kind, name, several, folder, world=world)
        assert {path.name for path in (Path(folder) / FOLDER).iterdir()} == {
            f"replica-{replica}-of-2.shard-{shard}-of-{shards}.safetensors"
            for replica in range(2)
            for shard in range(shards)
        }
    assert ends[0] == ends[1] and outer == saved
    assert all((its_ends, its_outer) == (ends, outer) for its_ends, its_outer, _ in others)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_dense_is_what_accelerate_does_alone(pool: WorkerPool, kind: str) -> None:
    world = 2 if kind == "ddp" else 4
    plain, ours = (pool.run(losses_of, kind, name, world=world) for name in ("plain", "dense"))
    for theirs, mine in zip(plain, ours, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("begin_anew", [True, False])
def test_a_checkpoint_without_ranks_files_is_refused_or_begins_a_round(pool: WorkerPool, begin_anew: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = pool.run(without_our_part, folder, begin_anew, world=2)
    assert first == second if begin_anew else "was saved without Synced" in first


def test_a_model_that_was_not_prepared_is_refused(pool: WorkerPool) -> None:
    assert all("call Synced after prepare" in said for said in pool.run(not_prepared, world=2))
