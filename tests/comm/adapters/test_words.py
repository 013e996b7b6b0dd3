"""What is said where something is not served, and recipes of the documentation that are more than a call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step, local_sgd, streaming_diloco
from dtrain.comm.inner_optimizers.chained import chain
from dtrain.comm.runtime.optimizer_mode import mode_kept
from dtrain.compress import error_feedback, powersgd, quantize
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, flat, small


def said_of(case: str) -> str:
    """What is raised, or warned of, at attach or in the first step."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    net: nn.Module = small()
    group, sync = None, diloco(every_steps=2)
    parameters = list(net.parameters())
    if case == "ignored parameters":
        fully_shard(net, mesh=mesh["shard"], ignored_params={parameters[0]})
        group = mesh.get_group("replicate")
    elif case == "tensor parallelism":
        both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tensor"))
        parallelize_module(net, both["tensor"], {"0": ColwiseParallel()})
        fully_shard(net, mesh=both["shard"])
        group = mesh.get_group("replicate")
    elif case == "on the meta device":
        net = net.to("meta")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if case == "several models":
        optimizer.add_param_group({"params": list(small().parameters())})
    elif case == "in backward":
        parameters[0]._in_backward_optimizers = [optimizer]  # type: ignore[attr-defined]
    elif case == "in a hook":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for parameter in parameters:
            inner = torch.optim.SGD([parameter], lr=0.1)
            parameter.register_post_accumulate_grad_hook(lambda _, inner=inner: inner.step())
    elif case == "low rank":
        sync = local_sgd(every_steps=2, compress=powersgd(8))
    try:
        attached = attach(net, optimizer, sync, replicate_group=group)
        backward(net, dist.get_rank(), 0)
        attached.step()
    except (RuntimeError, ValueError, TypeError, RuntimeWarning) as error:
        return str(error)
    return ""


def scaled(infinite: bool) -> tuple[list[bool], float, Tensor, Tensor]:
    """The recipe of docs/own_loop.md: what steps said, the scale at the end, the model, and one without a scale."""
    found = []
    said: list[bool] = []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for scales in (True, False):
        model = DistributedDataParallel(small())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = attach(model, optimizer, every_step(compress=error_feedback(quantize(bits=8))))
        for step in range(6):
            x = torch.full((5, 7), 1.0 + dist.get_rank() + step)
            loss = model(x).square().mean()
            if step == 1 and infinite:
                loss = loss * (float("inf") if dist.get_rank() else 1.0)
            if not scales:
                loss.backward()
                sync.step()
                continue
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            before = scaler.get_scale()
            said.append(sync.step())
            scaler.update(None if said[-1] else before * scaler.get_backoff_factor())
            if scaler.get_scale() != before:
                sync.feedback.rescale(scaler.get_scale() / before)
        found.append(flat(model))
        sync.detach()
    return said, scaler.get_scale(), found[0], found[1]


class TwoFaced(torch.optim.SGD):
    """As schedule-free optimizers: the model holds y in training, and x between y and z in evaluation."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = True

    def train(self) -> None:
        self._swap(True, 2.0)

    def eval(self) -> None:
        self._swap(False, 0.5)

    @torch.no_grad()
    def _swap(self, train_mode: bool, factor: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for parameter in group["params"]:
                    parameter.mul_(factor)
            group["train_mode"] = train_mode


def looked_at(kind: str) -> tuple[Tensor, Tensor]:
    """The same training with a look at the model in each step, and without."""
    found = []
    for looks in (True, False):
        model = DistributedDataParallel(small())
        optimizer = TwoFaced(model.parameters(), lr=0.1)
        sync = diloco(every_steps=3) if kind == "diloco" else every_step()
        attached = attach(model, optimizer, sync)
        for step in range(5):
            backward(model, dist.get_rank(), step)
            attached.step()
            if looks:
                with attached.evaluation():
                    optimizer.eval()
                optimizer.train()
        found.append(flat(model))
        attached.detach()
    return found[0], found[1]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("ignored parameters", "leave ignored_params out"),
        ("tensor parallelism", "tensor parallelism beside FSDP2"),
        ("on the meta device", "holds no numbers yet"),
        ("several models", "nn.ModuleDict"),
        ("in backward", "stepped within backward()"),
        ("in a hook", "give attach one that does not"),
    ],
)
def test_what_is_not_served_is_told_with_its_way_out(pool: WorkerPool, case: str, words: str) -> None:
    for message in pool.run(said_of, case, world=2):
        assert words in message


@pytest.mark.processes
def test_a_loss_scale_goes_down_on_all_ranks_where_one_had_an_infinity(pool: WorkerPool) -> None:
    for said, scale, mine, expected in pool.run(scaled, True, world=2):
        assert said == [True, False, True, True, True, True] and scale == 1024.0
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["diloco", "every step"])
def test_a_look_with_an_optimizer_that_has_two_faces_changes_nothing(pool: WorkerPool, kind: str) -> None:
    for looked, other in pool.run(looked_at, kind, world=2):
        assert torch.equal(looked, other)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("start", ["train", "eval"])
def test_an_optimizer_is_left_in_the_mode_in_which_it_was_found(start: str, several: bool) -> None:
    optimizer = TwoFaced(small().parameters(), lr=0.1)
    getattr(optimizer, start)()
    before = copy.deepcopy(optimizer.param_groups[0]["train_mode"])
    with mode_kept(chain(torch.optim.SGD(small().parameters(), lr=0.1), optimizer) if several else optimizer):
        optimizer.eval()
        optimizer.train()
        optimizer.eval() if start == "train" else optimizer.train()
    assert optimizer.param_groups[0]["train_mode"] == before


def test_a_model_without_numbered_blocks_is_told_the_argument_that_there_is() -> None:
    with pytest.raises(ValueError, match="fragments_by_name="):
        streaming_diloco(layers_per_fragment=1).fragments.cut({"w": (2, 2)})
