"""Calls that are missing or come too early lose training without an error of torch: they are told, on this rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

from dtrain import attach, diloco, every_step, fedkseed, sparta, streaming_diloco
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, small
from tests.comm.adapters.test_left_open import threads_of_gloo

pytestmark = pytest.mark.processes


def attached_to(engine: str, sync: Sync) -> tuple[nn.Sequential, nn.Module, Attached]:
    """A small model in ``engine``, two replicas of one rank."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    net = small()
    model: nn.Module = net
    group = None
    if engine == "ddp":
        model = DistributedDataParallel(net, find_unused_parameters=True)
    if engine == "fsdp":
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh["shard"])
        group = mesh.get_group("replicate")
    return net, model, attach(model, torch.optim.SGD(model.parameters(), lr=0.1), sync, replicate_group=group)


# ---- a step without gradients ----------------------------------------------------------------------------------------


def said_in_three_steps(engine: str, sync: Sync, case: str) -> list[str]:
    net, model, attached = attached_to(engine, sync)
    if case == "all frozen":
        net.requires_grad_(False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            if case == "a part":
                (net[2](torch.ones(2, 19)) if engine == "plain" else model(torch.ones(2, 7))).sum().backward()
            elif case in ("cleared", "all of it"):
                backward(model, dist.get_rank(), step)
            if case == "cleared":
                attached.pieces.optimizer.zero_grad()
            attached.step()
    attached.close_round()
    attached.detach()
    return [str(warning.message) for warning in said if warning.category is RuntimeWarning]


NOTHING = [
    "a step trained nothing: none of 4 trainable parameters has a gradient. Was backward() not called, or zero_grad() "
    "after it? sync.step() clears what it has used itself"
]


@pytest.mark.parametrize("case", ["cleared", "no backward pass"])
@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp"])
def test_a_step_that_trains_nothing_is_told_once(pool: WorkerPool, engine: str, case: str) -> None:
    assert pool.run(said_in_three_steps, engine, diloco(every_steps=2), case, world=2) == [NOTHING, NOTHING]


def test_it_is_an_error_where_gradients_are_exchanged(pool: WorkerPool) -> None:
    with pytest.raises(RuntimeError, match=r"no gradient was exchanged since the last sync\.step\(\)"):
        pool.run(said_in_three_steps, "ddp", every_step(), "no backward pass", world=2)


@pytest.mark.parametrize("case", ["all of it", "a part", "all frozen"])
@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp"])
def test_a_step_of_some_gradients_is_not(pool: WorkerPool, engine: str, case: str) -> None:
    assert pool.run(said_in_three_steps, engine, diloco(every_steps=2), case, world=2) == [[], []]


# ---- detach within a round -------------------------------------------------------------------------------------------


def failed(attached: Attached) -> None:
    try:
        raise KeyError
    finally:
        attached.detach()


def said_by_detach(sync: Sync, steps: int, before: str, folder: Path) -> list[str]:
    _, model, attached = attached_to("ddp" if sync == every_step() else "plain", sync)
    for step in range(steps):
        if isinstance(sync, type(FORWARD_ONLY)):
            attached.estimate(lambda: model(torch.ones(2, 7)).square().mean())
        else:
            backward(model, dist.get_rank(), step)
        attached.step()
    if before == "close_round":
        attached.close_round()
    elif before == "save":
        attached.save(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if before == "error":
            with pytest.raises(KeyError):
                failed(attached)
        else:
            attached.detach()
    return [str(warning.message) for warning in said if warning.category is RuntimeWarning]


FORWARD_ONLY = fedkseed(every_steps=4)
OPEN: list[Callable[[], Sync]] = [
    lambda: diloco(every_steps=4),
    lambda: streaming_diloco(every_steps=4, overlap_steps=1, layers_per_fragment=0),
    sparta,
    lambda: FORWARD_ONLY,
]


@pytest.mark.parametrize("number", range(len(OPEN)))
def test_detach_within_a_round_is_told(pool: WorkerPool, number: int, tmp_path: Path) -> None:
    for said in pool.run(said_by_detach, OPEN[number](), 2, "nothing", tmp_path, world=2):
        assert len(said) == 1 and said[0].startswith("detach() at step 2, within a round")
        assert "call close_round() before it" in said[0]


@pytest.mark.parametrize(
    ("steps", "before"), [(0, "nothing"), (4, "nothing"), (2, "close_round"), (2, "save"), (2, "error")]
)
def test_detach_is_quiet_where_nothing_is_lost(pool: WorkerPool, steps: int, before: str, tmp_path: Path) -> None:
    assert pool.run(said_by_detach, diloco(every_steps=4), steps, before, tmp_path, world=2) == [[], []]


def test_detach_is_quiet_where_there_are_no_rounds(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(said_by_detach, every_step(), 2, "nothing", tmp_path, world=2) == [[], []]


# ---- a refusal of the adapter ----------------------------------------------------------------------------------------


def threads_of_a_refusal() -> tuple[int, int]:
    """Threads of gloo before and after."""
    model = DistributedDataParallel(small(), mixed_precision=_MixedPrecision(param_dtype=torch.float32))
    before = threads_of_gloo()
    with pytest.raises(ValueError, match="built with mixed_precision"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step())
    return before, threads_of_gloo()


def test_a_model_that_its_adapter_refuses_leaves_no_group_open(pool: WorkerPool) -> None:
    for before, after in pool.run(threads_of_a_refusal, world=2):
        assert before == after
