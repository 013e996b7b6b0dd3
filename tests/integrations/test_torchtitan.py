"""A trainer built like torchtitan's, with a sync in it: container of optimizers, native HSDP, checkpoints by DCP.

torchtitan itself is not here; what stands for it is written from its interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from dtrain import attach, diloco, every_step, streaming_diloco
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize
from dtrain.testing import WorkerPool

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

SPECS: dict[str, Sync] = {
    "dense": every_step(),
    "int8": every_step(compress=error_feedback(quantize(bits=8, block=16))),
    "diloco": diloco(every_steps=4),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=2, layers_per_fragment=0),
}
STOP, END = 6, 11
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Container(torch.optim.Optimizer, Stateful):
    """Like ``OptimizersContainer``: an optimizer for each part of a model, itself one for the sake of hooks."""

    def __init__(self, parts: list[nn.Module], **settings: Any) -> None:
        self.parts = parts
        self.optimizers = [torch.optim.AdamW(part.parameters(), **settings) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], settings)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        for optimizer in self:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self:
            optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self.parts, self.optimizers, strict=True)
        return {n: v for part, one in pairs for n, v in get_optimizer_state_dict(part, one, options=FLAT).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state_dict, options=FLAT)


class OptimizersInBackwardContainer(Container):
    """Its optimizers would be stepped by hooks on gradients."""


class Weights(Stateful):
    """Like ``ModelWrapper``: the state of a model, taken once, of tensors that share the parameters' memory."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self.taken = self._take()

    def _take(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in get_model_state_dict(part).items()}

    def state_dict(self) -> dict[str, Any]:
        return self.taken

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.parts:
            set_model_state_dict(part, state_dict, options=StateDictOptions(strict=False))
        self.taken = self._take()


class Trainer:
    """What torchtitan's trainer does with a model, from its construction to its checkpoints."""

    def __init__(self, mesh: DeviceMesh, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(7, 19), nn.Tanh(), nn.Linear(19, 3))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        self.model_parts = [cast(nn.Module, fully_shard(model, mesh=mesh))]
        self.optimizers = Container(self.model_parts, lr=0.02)
        self.schedulers = [LambdaLR(optimizer, lambda step: 0.9**step) for optimizer in self.optimizers]
        self.hooked = 0
        self.optimizers.register_step_post_hook(self._hook)
        self.step = 0
        self.states: dict[str, Any] = {
            "model": Weights(self.model_parts), "optimizer": self.optimizers, "lr_scheduler": self.schedulers[0],
            "train_state": self,
        }  # fmt: skip

    def _hook(self, *_: object) -> None:
        self.hooked += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def train(self, last: int) -> list[float]:
        losses = []
        while self.step < last:
            self.optimizers.zero_grad()
            generator = torch.Generator().manual_seed(100 * self.step + dist.get_rank())
            x, y = (torch.randn(5, width, generator=generator) for width in (7, 3))
            loss = (self.model_parts[0](x) - y).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model_parts[0].parameters(), 1.0)
            self.optimizers.step()
            for scheduler in self.schedulers:
                scheduler.step()
            self.step += 1
            losses.append(float(loss.detach()))
        return losses

    def save(self, folder: str, later: bool = False) -> Callable[[], object]:
        """Save the parameters under their own names and each of ``states`` under its name; returns how to wait."""
        states = {name: value for name, value in self.states.items() if name != "model"} | self.states[
            "model"
        ].state_dict()
        if later:
            return cast("Future[object]", async_save(states, checkpoint_id=folder)).result
        save(states, checkpoint_id=folder)
        return lambda: None

    def load(self, folder: str, exclude: tuple[str, ...]) -> None:
        """Load all but ``exclude``, the model last."""
        states = {name: value for name, value in self.states.items() if name not in exclude}
        weights = cast("Weights | None", states.pop("model", None))
        states |= weights.state_dict() if weights is not None else {}
        load(states, checkpoint_id=folder)
        self.states["model"].load_state_dict(states)

    def weights(self) -> Tensor:
        return torch.cat([cast(DTensor, p).to_local().reshape(-1).detach().clone() for p in self._parameters()])

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.model_parts[0].parameters())


def hybrid_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))


class Synced(Trainer):
    """The lines that a user adds, as docs/integrations/torchtitan.md has them."""

    def __init__(self, mesh: DeviceMesh, name: str, seed: int = 0) -> None:
        super().__init__(mesh, seed)
        self.sync: Attached = attach(self.model_parts[0], self.optimizers, SPECS[name], forward_steps=True)
        self.states["dtrain"] = self.sync.checkpoint

    def save(self, folder: str, later: bool = False) -> Callable[[], object]:
        with self.sync.evaluation():
            return super().save(folder, later)


def resumed(name: str, later: bool, folder: str) -> list[bool]:
    """Whether what is saved are the outer parameters, and a run that was resumed ends bitwise as one that was not."""
    mesh = hybrid_mesh()
    once = Synced(mesh, name)
    once.train(STOP)
    wait = once.save(folder, later)
    with once.sync.evaluation():
        outer = once.weights()
    losses = once.train(END)
    wait()
    assert once.hooked == once.sync.steps == END
    again = Synced(mesh, name, seed=1)
    again.load(folder, exclude=("model", "optimizer"))
    assert again.sync.steps == again.step == STOP
    same_losses = again.train(END) == losses
    for trainer in (once, again):
        trainer.sync.close_round()
        trainer.sync.detach()
    plain = Trainer(mesh, seed=2)
    plain.load(folder, exclude=())
    return [torch.equal(plain.weights(), outer), same_losses, torch.equal(once.weights(), again.weights())]


def model_loaded_last(folder: str) -> str:
    mesh = hybrid_mesh()
    once = Synced(mesh, "diloco")
    once.train(STOP)
    once.save(folder)
    outer = Trainer(mesh, seed=2)
    outer.load(folder, exclude=())
    again = Synced(mesh, "diloco", seed=1)
    again.load(folder, exclude=("model", "optimizer"))
    with torch.no_grad():
        for mine, saved in zip(again._parameters(), outer._parameters(), strict=True):
            cast(DTensor, mine).to_local().copy_(cast(DTensor, saved).to_local())
    try:
        again.train(STOP + 1)
    except RuntimeError as error:
        return str(error)
    return ""


def dense_and_native() -> tuple[list[float], list[float]]:
    mesh = hybrid_mesh()
    native, dense = Trainer(mesh), Synced(mesh, "dense")
    return native.train(30), dense.train(30)


@pytest.mark.parametrize(("name", "later"), [*((name, False) for name in SPECS), ("streaming", True)])
def test_a_checkpoint_in_a_round_goes_on_bitwise(pool: WorkerPool, name: str, later: bool, tmp_path: Path) -> None:
    assert pool.run(resumed, name, later, str(tmp_path), world=4) == [[True] * 3] * 4


def test_a_model_that_is_loaded_over_what_a_sync_has_loaded_is_told(pool: WorkerPool, tmp_path: Path) -> None:
    for said in pool.run(model_loaded_last, str(tmp_path), world=4):
        assert "something loaded other parameters after" in said, said


def test_dense_is_native_hsdp(pool: WorkerPool) -> None:
    for native, dense in pool.run(dense_and_native, world=4):
        assert dense == pytest.approx(native, rel=1e-5)


def test_optimizers_that_step_within_backward_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="steps each parameter within backward"):
        attach(model, OptimizersInBackwardContainer([model], lr=0.1), SPECS["diloco"])


def test_several_model_parts_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"it is the only one: model_parts\[0\]"):
        attach([model], Container([model], lr=0.1), SPECS["diloco"])  # type: ignore[arg-type]
