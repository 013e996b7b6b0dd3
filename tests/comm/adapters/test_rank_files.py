"""`Attached.save` and `load`: stopped in the middle of a round and gone on with, bitwise as if never stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adafactor, AdamW

from dtrain import attach, diloco, every_step, streaming_diloco
from dtrain.comm import tensor_file
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, topk
from dtrain.inner import muon
from dtrain.testing import WorkerPool
from dtrain.train.engines import build_engine
from dtrain.train.engines.engine import EngineOptions
from dtrain.train.mesh import build_mesh
from tests.comm.adapters.test_attach import backward, sharded

pytestmark = pytest.mark.processes

SPECS: dict[str, Sync] = {
    "top-k": every_step(compress=error_feedback(topk(0.2))),
    "diloco": diloco(every_steps=4),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=2, layers_per_fragment=0),
}
MODELS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda model: AdamW(model.parameters(), lr=0.01),
    "Muon": lambda model: muon(model, matrices=["0.weight"]),
    "two": lambda model: [AdamW(cast(Any, model)[n].parameters(), lr=0.01, amsgrad=n == 0) for n in (0, 3)],
    "Adafactor": lambda model: Adafactor(model.parameters(), lr=0.01),
}
STOP, END = 6, 11


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 19), nn.BatchNorm1d(19), nn.Tanh(), nn.Linear(19, 3))


class Training:
    """A model in DDP, in FSDP2 or alone, under a sync."""

    def __init__(self, kind: str, name: str, optimizer: str, seed: int = 0) -> None:
        self.net = net(seed)
        self.model, group = cast(nn.Module, self.net), None
        if kind == "ddp":
            self.model = DistributedDataParallel(self.net, broadcast_buffers=False)
        elif kind == "fsdp":
            self.model, group = sharded(nn.Sequential(self.net[0], self.net[2], self.net[3]))
            self.net = cast(nn.Sequential, self.model)
        chosen = MODELS[optimizer](self.net if optimizer != "two" or kind != "fsdp" else _numbered(self.net))
        self.optimizers = chosen if isinstance(chosen, list) else [chosen]
        self.sync: Attached = attach(self.model, chosen, SPECS[name], replicate_group=group)

    def train(self, steps: range) -> None:
        for step in steps:
            backward(self.model, dist.get_rank(), step)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 * 0.9**step
            self.sync.step()

    def state(self) -> list[Tensor]:
        parameters = [cast(Any, p).full_tensor() if hasattr(p, "full_tensor") else p for p in self.net.parameters()]
        tensors = [*parameters, *self.net.buffers()]
        return [tensor.detach().clone() for tensor in tensors]


def _numbered(model: nn.Module) -> Any:
    return {0: cast(Any, model)[0], 3: cast(Any, model)[2]}


def on_with(kind: str, name: str, optimizer: str, folder: str, evaluating: bool) -> bool:
    """Whether a run that was saved, and loaded into a new model, ends as one that was not."""
    whole = Training(kind, name, optimizer)
    whole.train(range(STOP))
    if evaluating:
        with whole.sync.evaluation():
            whole.sync.save(folder)
    else:
        whole.sync.save(folder)
    whole.train(range(STOP, END))
    end = whole.state()
    whole.sync.detach()
    again = Training(kind, name, optimizer, seed=1)
    again.sync.load(folder)
    assert again.sync.steps == STOP
    again.train(range(STOP, END))
    same = all(torch.equal(a, b) for a, b in zip(end, again.state(), strict=True))
    again.sync.detach()
    return same


def on_with_dcp(kind: str, name: str, folder: str, later: bool) -> bool:
    """The same through ``torch.distributed.checkpoint``; ``later``: saved while training goes on."""
    whole = Training(kind, name, "AdamW")
    whole.train(range(STOP))
    saving = None
    if later:
        saving = cast("Future[object]", async_save({"dtrain": whole.sync.checkpoint}, checkpoint_id=folder))
    else:
        save({"dtrain": whole.sync.checkpoint}, checkpoint_id=folder)
    whole.train(range(STOP, END))
    if saving is not None:
        saving.result()
    end = whole.state()
    whole.sync.detach()
    again = Training(kind, name, "AdamW", seed=1)
    load({"dtrain": again.sync.checkpoint}, checkpoint_id=folder)
    assert again.sync.steps == STOP
    again.train(range(STOP, END))
    again.sync.detach()
    return all(torch.equal(a, b) for a, b in zip(end, again.state(), strict=True))


class ZeroNet(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(9, 14), nn.Linear(14, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return cast(Tensor, self.second(torch.tanh(self.first(batch["x"]))).square().mean())


def on_with_zero(stage: str, name: str, folder: str, forward: bool) -> bool:
    """The same in a DeepSpeed engine; ``forward``: by ``engine.step()``."""
    mesh = build_mesh(2, 2)
    options = EngineOptions(
        precision="fp32", activation_checkpointing=False, bucket_mib=1, clip_norm=0.0, microbatches=1, microbatch_size=4
    )
    ends = []
    for part in ("whole", "again"):
        model = ZeroNet(int(part == "again"))
        engine = cast(Any, build_engine(stage, model, lambda m: AdamW(m.parameters(), lr=0.01), mesh, options))
        engine.pieces.detach()
        group = mesh.channel.transports["replicate"].group  # type: ignore[attr-defined]
        sync = attach(engine.deepspeed, None, SPECS[name], replicate_group=group, forward_steps=forward)
        if part == "again":
            sync.load(folder)
        for step in range(sync.steps, END):
            if part == "whole" and step == STOP:
                sync.save(folder)
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            engine.deepspeed.backward(engine.deepspeed({"x": torch.randn(4, 9, generator=generator)}))
            if forward:
                engine.deepspeed.step()
            else:
                sync.step()
        assert sync.steps == END
        ends.append(sync.pieces.read())
        sync.detach()
        engine.close()
    mesh.control.close()
    return all(torch.equal(ends[0][fqn], ends[1][fqn]) for fqn in ends[0])


def refusals(folder: str, kind: str) -> str:
    """What a rank is told when it loads what does not fit."""
    training = Training("ddp", "top-k", "AdamW")
    training.train(range(2))
    training.sync.save(folder)
    training.sync.detach()
    own = Path(folder) / f"replica-{dist.get_rank()}-of-2.shard-0-of-1.safetensors"
    assert own.exists()
    dist.barrier()
    if kind == "missing" and dist.get_rank() == 1:
        own.unlink()
    if kind == "steps" and dist.get_rank() == 1:
        later = cast("dict[str, Any]", tensor_file.read(own))
        next(iter(later["sync"].values()))["numbers"]["steps"] += 2
        tensor_file.write(own, later)
    if kind == "damaged" and dist.get_rank() == 1:
        content = bytearray(own.read_bytes())
        content[-1] ^= 1
        own.write_bytes(content)
    dist.barrier()
    other = Training("ddp", "diloco" if kind == "sync" else "top-k", "AdamW")
    if kind == "model":
        other.sync.detach()
        model = DistributedDataParallel(nn.Linear(7, 3))
        other.sync = attach(model, AdamW(model.parameters()), SPECS["top-k"])
    before = other.sync.pieces.read()
    try:
        other.sync.load(folder)
    except (ValueError, OSError, RuntimeError) as error:
        changed = not all(torch.equal(value, before[fqn]) for fqn, value in other.sync.pieces.read().items())
        other.sync.detach()
        return f"{type(error).__name__}: {error}" + (" CHANGED" if changed else "")
    return "loaded"


@pytest.mark.parametrize(
    ("kind", "name", "optimizer", "evaluating"),
    [
        *((kind, name, "AdamW", False) for kind in ("ddp", "fsdp") for name in SPECS),
        *(("plain", name, "AdamW", False) for name in ("diloco", "streaming")),
        *(("ddp", "diloco", optimizer, False) for optimizer in ("Muon", "two", "Adafactor")),
        *(("fsdp", "streaming", optimizer, False) for optimizer in ("Muon", "two")),
        *((kind, "diloco", "AdamW", True) for kind in ("ddp", "fsdp")),
    ],
)  # fmt: skip
def test_it_goes_on_bitwise(pool: WorkerPool, kind: str, name: str, optimizer: str, evaluating: bool) -> None:
    world = 4 if kind == "fsdp" else 2
    with tempfile.TemporaryDirectory() as folder:
        assert pool.run(on_with, kind, name, optimizer, folder, evaluating, world=world) == [True] * world


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_it_goes_on_bitwise_from_dcp(pool: WorkerPool, kind: str, later: bool) -> None:
    world = 4 if kind == "fsdp" else 2
    with tempfile.TemporaryDirectory() as folder:
        assert pool.run(on_with_dcp, kind, "streaming", folder, later, world=world) == [True] * world


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_it_goes_on_bitwise_in_deepspeed(pool: WorkerPool, stage: str, forward: bool) -> None:
    name = "diloco" if forward else "top-k"
    with tempfile.TemporaryDirectory() as folder:
        assert pool.run(on_with_zero, stage, name, folder, forward, world=4) == [True] * 4


def saved_apart() -> str:
    """What a rank is told that saves after another number of steps than the others."""
    training = Training("plain", "diloco", "AdamW")
    training.train(range(2 + dist.get_rank()))
    try:
        with tempfile.TemporaryDirectory() as folder:
            training.sync.save(folder)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_save_at_different_steps_are_told(pool: WorkerPool) -> None:
    assert all("different steps: [2, 3] on the replicas" in said for said in pool.run(saved_apart, world=2))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["RuntimeError: the part of replicas [1] was not read", "FileNotFoundError: "]),
        ("damaged", ["RuntimeError: the part of replicas [1] was not read", "DamagedFile: "]),
        ("model", ["ValueError: ", "ValueError: "]),
        ("steps", ["ValueError: the parts are of different steps: [2, 4]"] * 2),
        ("sync", ["ValueError: this state was saved with", "ValueError: this state was saved with"]),
    ],
)
def test_all_ranks_refuse_what_one_refuses(pool: WorkerPool, kind: str, words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        said = pool.run(refusals, folder, kind, world=2)
        assert [each.startswith(word) for each, word in zip(said, words, strict=True)] == [True, True], said
        assert not any("CHANGED" in each for each in said)
