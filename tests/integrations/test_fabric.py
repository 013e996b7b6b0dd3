"""A loop of Lightning Fabric with a sync in it: nothing in the loop changes, and nothing is lost at a checkpoint."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

from dtrain import attach
from dtrain.integrations.fabric import Synced
from dtrain.testing import WorkerPool
from tests.integrations.test_lightning import END, METHODS, STOP, declared_bytes, launched, said, weights
from tests.integrations.test_lightning_fsdp2 import SHARD, UNITS

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

EACH = 2
"""Batches of a step."""


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 19), nn.Tanh(), nn.Linear(19, 3))


def sharded(model: nn.Module, _: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in (model[0], model[2], model):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(EACH * 30, 5, 7, generator=torch.Generator().manual_seed(100 + dist.get_rank()))
    return list(zip(x, x[..., :3].tanh(), strict=True))


class Loop:
    """A loop as Fabric's documentation has it."""

    def __init__(self, kind: str, name: str, seed: int = 0, **options: Any) -> None:
        world = dist.get_world_size()
        strategy = ModelParallelStrategy(sharded, world, 1) if kind == "fsdp" else DDPStrategy()
        self.fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
        self.fabric.launch()
        self.model = self.fabric.setup_module(net(seed))
        layers = self.model.module
        made: list[torch.optim.Optimizer] = [AdamW(self.model.parameters(), lr=0.02)]
        if kind == "two":
            made = [AdamW(layers[0].parameters(), lr=0.02), SGD(layers[2].parameters(), lr=0.1)]
        optimizers = self.fabric.setup_optimizers(*made)
        self.optimizers = list(optimizers) if kind == "two" else [optimizers]
        self.losses: list[float] = []
        self.synced: Any = None
        if name != "plain":
            given = self.optimizers if kind == "two" else self.optimizers[0]
            self.synced = Synced(self.fabric, self.model, given, METHODS[name], **options)

    def train(self, first: int, last: int) -> None:
        for number in range(EACH * first, EACH * last):
            x, y = batches()[number]
            ends = number % EACH == EACH - 1
            with self.fabric.no_backward_sync(self.model, enabled=not ends):
                loss = (self.model(x) - y).square().mean()
                self.fabric.backward(loss)
            if ends:
                self.fabric.clip_gradients(self.model, self.optimizers[0], max_norm=0.5)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            self.losses.append(float(loss.detach()))

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "step": STOP} | {
            f"optimizer {number}": optimizer for number, optimizer in enumerate(self.optimizers)
        }

    def weights(self) -> list[float]:
        return weights(self.model)


def went_on(kind: str, name: str, folder: str) -> dict[str, Any]:
    """Of a run, and of one that was loaded in the middle: weights and losses; the outer weights, and the bytes."""
    path = Path(folder) / "checkpoint"
    with launched():
        once = Loop(kind, name)
        once.train(0, 1)
        sent = once.synced.sync.meter.sent_bytes
        once.train(1, STOP)
        once.fabric.save(path, once.state())
        with once.synced.evaluation():
            outer = once.weights()
        live = once.weights()
        once.train(STOP, END)
        meter = once.synced.sync.meter
        once.synced.close()
        assert "save" not in vars(once.fabric) and "zero_grad" not in vars(once.optimizers[0])
        labels = {label for _, label, _ in meter.by if label.startswith("fragment")}
        found = {"outer": outer, "live": live, "sent": meter.sent_bytes - sent, "messages": len(labels) or 1}
        found |= {"end": once.weights(), "losses": once.losses}
    with launched():
        again = Loop(kind, name, seed=1)
        rest = again.fabric.load(path, again.state())
        assert again.synced.sync.steps == STOP and rest == {}
        again.train(STOP, END)
        again.synced.close()
        found |= {"its end": again.weights(), "its losses": again.losses}
        plain = Loop(kind, "plain", seed=1)
        plain.fabric.load(path, {"model": plain.model})
        return found | {"saved": plain.weights()}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("one", name) for name in METHODS),
        *(("two", name) for name in ("int8", "diloco")),
        *(("fsdp", name) for name in ("int8", "diloco", "streaming")),
    ],
)
def test_it_goes_on_bitwise(pool: WorkerPool, kind: str, name: str, tmp_path: Path) -> None:
    ranks = pool.run(went_on, kind, name, str(tmp_path), world=4 if kind == "fsdp" else 2)
    one, last = ranks[0], ranks[-1]
    for number, rank in enumerate(ranks):
        assert rank["its end"] == rank["end"] == one["end"] and rank["saved"] == rank["outer"] == one["outer"]
        assert rank["its losses"] == rank["losses"][EACH * STOP :]
        assert rank["losses"][-1] < 0.8 * rank["losses"][0]
        parameters, units = (SHARD[number % 2], UNITS[name]) if kind == "fsdp" else ((133, 19, 57, 3), 1)
        assert rank["sent"] == declared_bytes(name, rank["messages"] * units, parameters)
    assert (one["live"] != last["live"]) == (name in ("diloco", "streaming"))


def dense_and_plain(kind: str) -> list[list[float]]:
    found = []
    for name in ("plain", "dense"):
        with launched():
            loop = Loop(kind, name)
            loop.train(0, 30)
            found.append(loop.losses)
    return found


@pytest.mark.parametrize("kind", ["one", "two", "fsdp"])
def test_dense_is_fabrics_own_data_parallelism(pool: WorkerPool, kind: str) -> None:
    for plain, dense in pool.run(dense_and_plain, kind, world=4 if kind == "fsdp" else 2):
        assert len(plain) == 30 * EACH and dense == pytest.approx(plain, abs=1e-5)


def plain_checkpoint(kind: str, folder: str) -> tuple[str, bool, list[float]]:
    """What is told of a checkpoint that Fabric alone has saved; whether a round begun there has its weights."""
    path = Path(folder) / "checkpoint"
    with launched():
        plain = Loop(kind, "plain")
        plain.train(0, STOP)
        plain.fabric.save(path, plain.state())
        saved = plain.weights()
        loop = Loop(kind, "diloco", seed=1)
        before = loop.weights()
        text = said(lambda: loop.fabric.load(path, loop.state()))
        assert loop.weights() == before  # nothing was loaded
        loop.fabric.save(path, loop.state())
        loop.synced.close()
        loop.fabric.save(path, loop.state())  # of no round
        stale = Loop(kind, "diloco")
        text += said(lambda: stale.fabric.load(path, stale.state()))
        stale.synced.close()
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(f"{path}.dtrain")
        plain.fabric.save(path, plain.state())
        anew = Loop(kind, "diloco", seed=1, begin_anew=True)
        anew.fabric.load(path, anew.state())
        loaded = anew.weights() == saved and anew.synced.sync.steps == 0
        anew.train(STOP, END)
        anew.synced.close()
        return text, loaded, anew.weights()


@pytest.mark.parametrize("kind", ["one", "fsdp"])
def test_a_checkpoint_without_files_of_the_ranks_is_refused_or_begins_a_round(
    pool: WorkerPool, kind: str, tmp_path: Path
) -> None:
    ranks = pool.run(plain_checkpoint, kind, str(tmp_path), world=4 if kind == "fsdp" else 2)
    for text, loaded, end in ranks:
        assert text.startswith("FileNotFoundError: ") and "Synced(.., begin_anew=True)" in text
        assert "is of step None of a sync" in text and loaded and end == ranks[0][2]


def other_states(folder: str) -> list[str]:
    """What does not hold the model is none of ours."""
    with launched():
        loop = Loop("one", "diloco")
        loop.fabric.save(Path(folder) / "notes", {"step": 3})
        assert loop.fabric.load(Path(folder) / "notes") == {"step": 3}
        url = said(lambda: loop.fabric.save("s3://bucket/last", loop.state()))
        loop.synced.close()
        dist.barrier()
        return [url, *(path.name for path in Path(folder).iterdir())]


def test_other_states_are_left_alone(pool: WorkerPool, tmp_path: Path) -> None:
    for url, *names in pool.run(other_states, str(tmp_path), world=2):
        assert names == ["notes"] and url.startswith("ValueError: s3://bucket/last is no path of a file system")


def with_a_scale() -> tuple[list[float], float, int]:
    """With a loss scale, and a step in which rank 1's gradients are not finite."""
    with launched():
        loop = Loop("one", "plain")
        loop.fabric.strategy.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        backward, factor = loop.fabric.backward, [1.0]
        loop.fabric.backward = lambda loss: backward(loop.fabric.strategy.precision.scaler.scale(loss) * factor[0])
        loop.fabric.strategy.precision.optimizer_step = lambda optimizer: scaled(loop, optimizer)
        loop.fabric.clip_gradients = lambda *_, **__: None
        loop.synced = Synced(loop.fabric, loop.model, loop.optimizers[0], METHODS["int8"])
        for step in range(4):
            factor[0] = float("inf") if step == 1 and dist.get_rank() == 1 else 1.0
            loop.train(step, step + 1)
        skipped = loop.synced.sync.skipped
        loop.synced.close()
        return loop.weights(), loop.fabric.strategy.precision.scaler.get_scale(), skipped


def scaled(loop: Loop, optimizer: torch.optim.Optimizer) -> None:
    """As Fabric's ``MixedPrecision``, which takes no scale on CPUs."""
    scaler = loop.fabric.strategy.precision.scaler
    scaler.step(optimizer)
    scaler.update()


def test_all_ranks_change_a_loss_scale_alike(pool: WorkerPool) -> None:
    one, other = pool.run(with_a_scale, world=2)
    assert one == other and one[1:] == (512.0, 1)


def refused(kind: str) -> str:
    with launched():
        loop = Loop("one", "plain")
        model, optimizer, work = loop.model, loop.optimizers[0], Synced
        if kind == "model":
            model = net()
        if kind == "optimizer":
            optimizer = AdamW(loop.model.parameters())
        if kind == "another":
            optimizer = loop.fabric.setup_optimizers(AdamW(net().parameters()))
        if kind == "twice":
            attached = Synced(loop.fabric, model, optimizer, METHODS["diloco"])
        if kind == "ranks" and dist.get_rank() == 1:
            return said(lambda: Synced(loop.fabric, model, optimizer, METHODS["diloco"], begin_anew=True))
        call: Callable[[], object] = lambda: work(loop.fabric, model, optimizer, METHODS["diloco"])  # noqa: E731
        text = said(call)
        if kind == "twice":
            attached.close()
        return text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("model", "ValueError: this Sequential was not set up; call fabric.setup"),
        ("optimizer", "ValueError: this AdamW was not set up; call fabric.setup"),
        ("another", "ValueError: 4 of the optimizer's 4 parameters are not the model's"),
        ("twice", "RuntimeError: "),
        ("ranks", "ValueError: ranks differ: begin_anew is False on rank 0 and True on rank 1"),
    ],
)
def test_what_is_refused(pool: WorkerPool, kind: str, words: str) -> None:
    for text in pool.run(refused, kind, world=2):
        assert text.startswith(words), text


def too_late() -> list[str]:
    with launched():
        loop = Loop("one", "plain")
        loop.train(0, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Synced(loop.fabric, loop.model, loop.optimizers[0], METHODS["diloco"]).close()
        return [str(warning.message) for warning in caught]


def test_one_that_comes_late_is_told(pool: WorkerPool) -> None:
    for texts in pool.run(too_late, world=2):
        assert any("call Synced before fabric.load" in text for text in texts)


def attached_by_hand() -> bool:
    """`attach` itself takes what Fabric has wrapped."""
    with launched():
        loop = Loop("one", "plain")
        sync = attach(loop.model, loop.optimizers[0], METHODS["diloco"], forward_steps=True)
        loop.train(0, 4)
        steps = sync.steps
        sync.detach()
        return steps == 4


def test_attach_takes_fabrics_wrappers(pool: WorkerPool) -> None:
    assert all(pool.run(attached_by_hand, world=2))
