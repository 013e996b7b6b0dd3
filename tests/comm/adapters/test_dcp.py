"""torch.distributed.checkpoint beside a sync: every rank's state is kept and comes back, in the order of the docs."""

from __future__ import annotations

import copy
import itertools
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step, local_sgd, streaming_diloco
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.compress import ef21, error_feedback, powersgd, quantize, topk
from dtrain.testing import WorkerPool

FEEDBACK = every_step(compress=error_feedback(topk(0.1)))
SPECS: dict[str, Sync] = {
    "feedback": FEEDBACK,
    "ef21": every_step(compress=ef21(topk(0.1))),
    "low rank": every_step(compress=error_feedback(powersgd(2))),
    "diloco": diloco(every_steps=4, compress=error_feedback(quantize(bits=8, block=16))),
    "sharded": diloco(every_steps=4, outer_state="sharded"),
    "streaming": streaming_diloco(every_steps=6, overlap_steps=3, layers_per_fragment=0),
}


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Run:
    """A model, its optimizer and a sync, in DDP, FSDP2 or native HSDP."""

    def __init__(self, kind: str, spec: Sync, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        self.kind = kind
        self.model: nn.Module
        group = None
        if kind == "ddp":
            self.model = DistributedDataParallel(small())
            self.replica = dist.get_rank()
        else:
            replicas = 3 if dist.get_world_size() == 3 else 2
            shape = (replicas, dist.get_world_size() // replicas)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            model, native = small(), kind == "hsdp"
            for layer in (model[0], model[2]):  # type: ignore[index]
                fully_shard(layer, mesh=mesh if native else mesh["shard"])
            self.model = cast(nn.Module, fully_shard(model, mesh=mesh if native else mesh["shard"]))
            self.replica, group = mesh.get_local_rank("replicate"), None if native else mesh.get_group("replicate")
        self.optimizer = make(self.model.parameters(), lr=0.01)
        self.sync: Attached = attach(self.model, self.optimizer, spec, replicate_group=group)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 * dist.get_rank() + self.sync.steps)
            self.model(torch.randn(5, 8, generator=generator)).square().mean().backward()
            self.sync.step()

    def flat(self) -> Tensor:
        return torch.cat([value for _, value in sorted(self.sync.pieces.read().items())])

    def residuals(self) -> list[Tensor]:
        self.sync.method.settle()
        return [t for _, named in sorted(self.sync.state.tensors.items()) for _, t in sorted(named.items())]


class Whole:
    """What torch's own tutorial wraps a training in."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        return {"sync": self.run.sync.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run.sync.load_state_dict(state["sync"])


def folder() -> Path:
    """One for all ranks."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return Path(cast(str, made[0]))


def through_dcp(way: str, one: Run, other: Run, path: Path) -> None:
    """``other`` loads the sync's state of ``one``; the parameters and the optimizer are copied."""

    def of(run: Run) -> dict[str, Any]:
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            "the sync itself": lambda: {"sync": run.sync},
            "its state": lambda: {"sync": run.sync.state_dict()},
            "its state by rank": lambda: {f"sync-{dist.get_rank()}": run.sync.state_dict()},
            "something that holds it": lambda: {"all": Whole(run)},
        }
        return ways[way.removeprefix("async, ")]()

    if way.startswith("async"):
        group = dist.new_group(backend="gloo")
        cast("Future[Any]", async_save(of(one), checkpoint_id=path, process_group=group)).result()
    else:
        save(of(one), checkpoint_id=path)
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    state = of(other)
    load(state, checkpoint_id=path)
    for value in state.values():  # what is no object of its own is filled, and loaded by whoever asked
        if not hasattr(value, "load_state_dict"):
            other.sync.load_state_dict(value)


def resumed(name: str, way: str) -> tuple[bool, bool, int]:
    """Whether the states are equal to the bit, whether they stay so in training; and the bytes that are kept."""
    one = Run("ddp", SPECS[name])
    one.train(5)
    other = Run("ddp", SPECS[name])
    through_dcp(way, one, other, folder())
    alike = all(torch.equal(a, b) for a, b in zip(one.residuals(), other.residuals(), strict=True))
    norm = int(sum(1 for tensor in other.residuals() if tensor.abs().sum() > 0))
    for run in (one, other):
        run.train(5)
    return alike, torch.equal(one.flat(), other.flat()), norm


WAYS = ["the sync itself", "its state", "its state by rank", "something that holds it", "async, the sync itself"]
CASES = [(name, "the sync itself") for name in SPECS] + [("feedback", way) for way in WAYS[1:]] + [("diloco", WAYS[4])]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_all_that_a_sync_keeps_goes_through_dcp(pool: WorkerPool, name: str, way: str) -> None:
    for alike, stays, kept in pool.run(resumed, name, way, world=2):
        assert alike and stays and kept


# ---- the optimizer's state -------------------------------------------------------------------------------------------


def documented(kind: str, name: str) -> tuple[bool, bool]:
    """In the order of docs/own_loop.md, with the model and the optimizer through DCP too, in mid-round."""
    path = folder()

    def state_of(run: Run) -> dict[str, Any]:
        model, optimizer = get_state_dict(run.model, run.optimizer)
        return {f"replica-{run.replica}": {"model": model, "optimizer": optimizer}, "sync": run.sync.state_dict()}

    one = Run(kind, SPECS[name])
    one.train(5)
    save(state_of(one), checkpoint_id=path)
    other = Run(kind, SPECS[name])
    state = state_of(other)
    load(state, checkpoint_id=path)
    own = state[f"replica-{other.replica}"]
    set_state_dict(other.model, other.optimizer, model_state_dict=own["model"], optim_state_dict=own["optimizer"])
    other.sync.load_state_dict(state["sync"])
    there = torch.equal(one.flat(), other.flat())
    for run in (one, other):
        run.train(6)
    return there, torch.equal(one.flat(), other.flat())


@pytest.mark.parametrize("name", ["feedback", "diloco", "streaming"])
@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_a_run_goes_on_bitwise_through_dcp(pool: WorkerPool, kind: str, world: int, name: str) -> None:
    for there, stays in pool.run(documented, kind, name, world=world):
        assert there and stays


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def heavy_ball(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def tensor_lr(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=torch.tensor(lr))


def torchs_functions(kind: str, make: Callable[..., torch.optim.Optimizer]) -> list[str]:
    """Names of those that raise, or move a parameter, before the first step and after two."""
    wrong = []
    for spec, trained in itertools.product((every_step(), local_sgd(every_steps=3)), (0, 2)):
        run = Run(kind, spec, make=make)
        run.train(trained)
        before = run.flat()
        calls: dict[str, Callable[[Run], object]] = {
            "get_optimizer_state_dict": lambda r: get_optimizer_state_dict(r.model, r.optimizer),
            "set_optimizer_state_dict": lambda r: set_optimizer_state_dict(
                r.model, r.optimizer, get_optimizer_state_dict(r.model, r.optimizer)
            ),
            "set_model_state_dict": lambda r: set_model_state_dict(r.model, get_model_state_dict(r.model)),
            "get_state_dict": lambda r: get_state_dict(r.model, r.optimizer),
        }
        for name, call in calls.items():
            try:
                call(run)
            except RuntimeError as error:
                wrong.append(f"{name}: {error}")
            if not torch.equal(before, run.flat()):
                wrong.append(f"{name} moved something")
        run.train(2)
        if torch.equal(before, run.flat()):
            wrong.append("training stood still")
        run.sync.detach()
    return wrong


@pytest.mark.parametrize("make", [torch.optim.AdamW, sgd, heavy_ball, tensor_lr])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_torchs_state_functions_work_on_what_is_attached(
    pool: WorkerPool, kind: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    assert pool.run(torchs_functions, kind, make, world=2) == [[], []]


def stepped_by_habit() -> list[str]:
    """What is said to somebody who steps the optimizer, whatever its rate."""
    said = []
    for lr in (0.01, 0.0):
        run = Run("ddp", every_step())
        run.optimizer.param_groups[0]["lr"] = lr
        run.model(torch.ones(2, 8)).square().mean().backward()
        try:
            run.optimizer.step()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
        run.sync.detach()
    return said


def test_a_step_by_habit_is_refused_also_where_a_warm_up_begins_at_zero(pool: WorkerPool) -> None:
    for said in pool.run(stepped_by_habit, world=2):
        assert all("this optimizer is stepped by its sync" in message for message in said)


def repaired(kind: str) -> tuple[bool, int]:
    """A bit of a moment of Adam's flipped in the last replica of three; whether all are equal again, and how often."""
    run = Run(kind, every_step(verify_every=4))
    run.train(3)
    if run.replica == 2:
        state = next(iter(run.optimizer.state.values()))["exp_avg"]
        local = state.to_local() if isinstance(state, DTensor) else state
        local.view(torch.int32).view(-1)[-1:] ^= 1 << 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train(1)
    return run.sync.verify(), run.sync.repairs


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_optimizers_state_is_repaired_on_every_engine(pool: WorkerPool, kind: str) -> None:
    assert pool.run(repaired, kind, world=3) == [(True, 1)] * 3


# ---- what is lost is told --------------------------------------------------------------------------------------------


def partly_loaded() -> str:
    path = folder()
    one = Run("ddp", FEEDBACK)
    one.train(3)
    save({"model": one.model.state_dict()}, checkpoint_id=path)
    other = Run("ddp", FEEDBACK)
    state: dict[str, Any] = {"model": other.model.state_dict(), "sync": other.sync}
    try:
        load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
    except ValueError as error:
        return str(error)
    return ""


def test_a_checkpoint_without_the_sync_is_not_taken_for_one_of_it(pool: WorkerPool) -> None:
    for said in pool.run(partly_loaded, world=2):
        assert "nothing was loaded into it since: is there none in the checkpoint?" in said


def saved_as_an_object(call: str) -> str:
    run = Run("ddp", FEEDBACK)
    run.train(2)
    try:
        if call == "torch.save":
            torch.save({"sync": run.sync}, folder() / f"{dist.get_rank()}.pt")
        else:
            dist.all_gather_object([None] * dist.get_world_size(), run.sync)
    except TypeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("call", ["torch.save", "all_gather_object"])
def test_a_sync_that_is_saved_whole_is_refused(pool: WorkerPool, call: str) -> None:
    for said in pool.run(saved_as_an_object, call, world=2):
        assert "cannot be pickled or copied; save its state" in said


def compared_under_join() -> tuple[int, int, int]:
    """One rank of three has fewer batches: it does not step, and is not compared; two go on."""
    run = Run("ddp", every_step(verify_every=2))
    with cast(DistributedDataParallel, run.model).join():
        for number in range(2 if dist.get_rank() == 0 else 7):
            run.model(torch.full((5, 8), float(number))).square().mean().backward()
            run.sync.step()
    return run.sync.steps, run.sync.repairs, run.sync.meter.sent_as("guard")


def test_who_has_no_batches_left_is_not_taken_for_one_who_differs(pool: WorkerPool) -> None:
    assert pool.run(compared_under_join, world=3) == [(7, 0, 3 * 2 * 16)] * 3
