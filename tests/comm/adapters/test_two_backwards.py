"""Several backward passes in a step, each with its exchange, and ranks that have ended before the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, dgc, every_step, local_update, onebit_adam
from dtrain.comm.compressors.projection import projection
from dtrain.comm.feedback import econtrol
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.compress import ef21, error_feedback, powersgd, quantize, randk, sign, topk
from dtrain.outer import sgd
from dtrain.testing import WorkerPool

pytestmark = pytest.mark.processes

METHODS: dict[str, Sync] = {
    "top-k": every_step(compress=error_feedback(topk(0.1))),
    "int8": every_step(compress=error_feedback(quantize(bits=8))),
    "sign": every_step(compress=error_feedback(sign(block=64))),
    "random-k": every_step(compress=error_feedback(randk(0.1))),
    "random-k, all-reduce": every_step(compress=error_feedback(randk(0.1)), route="all_reduce"),
    "projection": every_step(compress=error_feedback(projection(4, block=64))),
    "powersgd": every_step(compress=error_feedback(powersgd(2))),
    "econtrol": every_step(compress=econtrol(topk(0.1), eta=0.3)),
    "dgc": dgc(0.1, momentum=0.0),
    "warm-up": local_update(
        every_steps=2, outer=sgd(), compress=error_feedback(topk(0.1)), warmup_steps=4, warmup_compress="same"
    ),
}
SIDE, STEPS = 24, 8


def mesh_of_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def sharded(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(net, mesh=mesh["shard"])
    return net


@contextmanager
def synced(method: Sync, engine: str, lr: float = 1.0, **options: Any) -> Iterator[tuple[nn.Module, Attached, Any]]:
    """A linear model of zeros under ``method``, the sync, and its weight, whole."""
    net: nn.Module = nn.Linear(SIDE, SIDE, bias=False)
    nn.init.zeros_(net.weight)  # type: ignore[arg-type]
    if engine == "ddp":
        model: nn.Module = DistributedDataParallel(net, **options)
        group = None
    elif engine == "ddp in shards":
        model, group = DistributedDataParallel(net, **options), mesh_of_two().get_group("replicate")
    else:
        mesh = mesh_of_two()
        model, group = sharded(net, mesh), mesh.get_group("replicate")
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=lr), method, replicate_group=group)
    weight = net.weight
    yield model, attached, lambda: weight.full_tensor().detach() if engine == "fsdp" else weight.detach()  # type: ignore[operator,union-attr]
    attached.detach()


def mean_of(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def left_out(attached: Attached) -> Tensor:
    """The mean residual, whole; every replica's ranks hold their own rows of it."""
    pieces, whole = attached.pieces, torch.zeros(SIDE * SIDE)
    segment = pieces.segments["weight"]
    whole[segment.offset : segment.stop] = attached.state.tensors["weight"]["residual"]
    dist.all_reduce(whole)
    return whole.view(SIDE, SIDE) / pieces.place.size


def backward(model: nn.Module, gradient: Tensor) -> None:
    (model(torch.eye(SIDE)) * gradient.T).sum().backward()


def off(method: str, engine: str, passes: int, **options: Any) -> float:
    """|sum of mean gradients - mean residual - what was applied| over |sum|, with an exchange for each pass."""
    generator, total = torch.Generator().manual_seed(dist.get_rank()), torch.zeros(SIDE, SIDE)
    with synced(METHODS[method], engine, **options) as (model, attached, weight):
        for _ in range(STEPS):
            for _ in range(passes):
                gradient = torch.randn(SIDE, SIDE, generator=generator)
                total += mean_of(gradient)
                backward(model, gradient)
            assert attached.step()
        return float((total - left_out(attached) + weight()).norm() / total.norm())


def all_off(engine: str, passes: int) -> dict[str, float]:
    some = ("top-k", "powersgd", "warm-up") if engine == "ddp in shards" else METHODS
    return {method: off(method, engine, passes) for method in some}


@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("ddp in shards", 4), ("fsdp", 4)])
def test_feedback_holds_over_a_step_of_several_backward_passes(pool: WorkerPool, engine: str, world: int) -> None:
    for found in pool.run(all_off, engine, 3, world=world):
        assert max(found.values()) < 1e-5, found


def with_other_ddps() -> list[float]:
    return [
        off("top-k", "ddp", 2, gradient_as_bucket_view=True),
        off("top-k", "ddp", 2, find_unused_parameters=True),
    ]


def test_feedback_holds_however_ddp_keeps_its_gradients(pool: WorkerPool) -> None:
    for found in pool.run(with_other_ddps, world=2):
        assert max(found) < 1e-5


def skipped(engine: str) -> tuple[float, bool]:
    """The same with a NaN in the first of two passes of one step, which is left out as a whole."""
    generator, total = torch.Generator().manual_seed(dist.get_rank()), torch.zeros(SIDE, SIDE)
    with synced(METHODS["top-k"], engine) as (model, attached, weight):
        made = []
        for step in range(STEPS):
            for number in range(2):
                gradient = torch.randn(SIDE, SIDE, generator=generator)
                if step == 3 and number == 0 and dist.get_rank() == 1:
                    gradient[0, 0] = torch.nan
                if step != 3:
                    total += mean_of(gradient)
                backward(model, gradient)
            made.append(attached.step())
        return float((total - left_out(attached) + weight()).norm() / total.norm()), made == [n != 3 for n in range(8)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_step_of_several_passes_is_skipped_as_a_whole(pool: WorkerPool, engine: str) -> None:
    for found, as_wanted in pool.run(skipped, engine, world=2):
        assert found < 1e-5 and as_wanted


TRAINED: dict[str, tuple[Sync, str]] = {
    "top-k": (every_step(compress=error_feedback(topk(0.05))), "sgd"),
    "ef21": (every_step(compress=ef21(topk(0.1), eta=1)), "sgd"),
    "dgc": (dgc(0.05, momentum=0.9), "slow sgd"),
    "onebit_adam": (onebit_adam(15), "adam"),
}


def losses(engine: str, each: bool) -> dict[str, float]:
    """At the end of training by three microbatches a step, with an ``each``-change for all of them or for the last."""
    found = {}
    for name, (method, inner) in TRAINED.items():
        if engine == "fsdp" and name != "onebit_adam":
            continue
        torch.manual_seed(0)
        net: nn.Module = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1))
        rank, group = dist.get_rank(), None
        if engine == "ddp":
            model: nn.Module = DistributedDataParallel(net)
        else:
            mesh = mesh_of_two()
            model, group = sharded(net, mesh), mesh.get_group("replicate")
        rates = {"sgd": 0.05, "slow sgd": 0.005}
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(model.parameters(), lr=1e-2)
            if inner == "adam"
            else torch.optim.SGD(model.parameters(), lr=rates[inner])
        )
        attached = attach(model, optimizer, method, replicate_group=group)
        generator, last = torch.Generator().manual_seed(rank), []
        for _ in range(60):
            total = 0.0
            for micro in range(3):
                x = torch.randn(16, 8, generator=generator)
                alone = not each and micro < 2
                if engine == "fsdp":
                    model.set_requires_gradient_sync(not alone)  # type: ignore[operator]
                with model.no_sync() if alone and engine == "ddp" else nullcontext():  # type: ignore[operator]
                    loss = (model(x) - x.sum(1, keepdim=True)).square().mean() / 3
                    loss.backward()
                total += loss.item()
            attached.step()
            last.append(total)
        attached.detach()
        found[name] = sum(last[-10:]) / 10
    return found


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_training_with_an_exchange_for_each_backward_pass_is_as_good_as_with_one(pool: WorkerPool, engine: str) -> None:
    often, once = pool.run(losses, engine, True, world=2)[0], pool.run(losses, engine, False, world=2)[0]
    for name, loss in often.items():
        assert loss < 1.3 * once[name] + 0.05, (name, often, once)


def unsynced_last(engine: str) -> list[str]:
    """What is said of a last microbatch that is not exchanged, the first time and after a step that was right."""
    said = []
    with synced(every_step(), engine) as (model, attached, _):
        for alone in (False, True):
            for last in (False, True):
                if engine == "fsdp":
                    model.set_requires_gradient_sync(not (alone and last))  # type: ignore[operator]
                quiet = alone and last and engine == "ddp"
                with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
                    backward(model, torch.ones(SIDE, SIDE))
            try:
                attached.step()
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_last_microbatch_that_is_not_exchanged_is_told(pool: WorkerPool, engine: str) -> None:
    for first, second in pool.run(unsynced_last, engine, world=2):
        assert first == "" and "the last backward pass of this step ran with" in second


def joined(method: str, nan: bool) -> tuple[float, int, int]:
    """The same identity where rank 0 ends long before rank 1; what was not applied of a skipped step is not counted."""
    rank, own = dist.get_rank(), torch.zeros(SIDE, SIDE)
    generator = torch.Generator().manual_seed(rank)
    with synced(METHODS[method], "ddp") as (model, attached, weight):
        with model.join():  # type: ignore[operator]
            for step in range(3 + 9 * rank):
                gradients = [torch.randn(SIDE, SIDE, generator=generator) for _ in range(2)]
                if nan and step == 6:
                    gradients[1][0, 0] = torch.inf
                else:
                    own += sum(gradients)
                for gradient in gradients:
                    backward(model, gradient)
                attached.step()
        total = mean_of(own)
        found = float((total - left_out(attached) + weight()).norm() / total.norm())
        return found, attached.steps, attached.skipped


@pytest.mark.parametrize("nan", [False, True])
def test_a_rank_that_has_ended_gives_what_its_feedback_keeps_once(pool: WorkerPool, nan: bool) -> None:
    for method in ("top-k", "random-k", "powersgd", "projection"):
        for found, steps, without in pool.run(joined, method, nan, world=2):
            assert found < 1e-5 and steps == 12 and without == nan, method
