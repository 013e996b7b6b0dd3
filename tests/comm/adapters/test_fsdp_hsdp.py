"""Native HSDP: what `attach` makes of a mesh with a replicate axis, and that all of it is undone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dtrain import attach, diloco, every_step, inner, streaming_diloco
from dtrain.comm.adapters.adapter import pieces_of
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize
from dtrain.testing import WorkerPool
from dtrain.train.mesh import build_mesh
from tests import torch_versions
from tests.comm.adapters.test_dcp import folder

pytestmark = pytest.mark.processes

AXES = ("replicate", "shard")


class Net(nn.Module):
    """Rows that two ranks do not hold evenly; a frozen layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 9, bias=bias)
        self.layers = nn.ModuleList([nn.Linear(9, 9, bias=bias) for _ in range(2)])
        self.still = nn.Linear(9, 9, bias=False).requires_grad_(False)
        self.head = nn.Linear(9, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        found: Tensor = self.head(self.still(x))
        return found


def hybrid_mesh(shape: tuple[int, ...] = (2, 2)) -> DeviceMesh:
    """Made first in a job, and once: torch caches layouts by mesh, with the names that groups had in another job."""
    return init_device_mesh("cpu", shape, mesh_dim_names=AXES)


def sharded(mesh: DeviceMesh, net: nn.Module | None = None, **options: Any) -> nn.Module:
    net = Net() if net is None else net
    for layer in cast(nn.ModuleList, net.layers):
        fully_shard(layer, mesh=mesh, **options)
    return cast(nn.Module, fully_shard(net, mesh=mesh, **options))


def backward(model: nn.Module, step: int) -> float:
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + step)
    loss = model(torch.randn(5, 7, generator=generator)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return float(loss.detach())


def train(model: nn.Module, sync: Attached, steps: int) -> None:
    for _ in range(steps):
        backward(model, sync.steps)
        assert sync.step()


def locals_of(model: nn.Module) -> list[Tensor]:
    return [cast(DTensor, p).to_local().detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[DTensor]:
    """The parameters, and the tensors of their shape that the optimizer keeps."""
    for parameter in model.parameters():
        yield cast(DTensor, parameter)
        if parameter in optimizer.state:
            yield from (t for t in optimizer.state[parameter].values() if isinstance(t, DTensor))


def laid_out(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[tuple[tuple[str, ...] | None, str]]:
    return {(t.device_mesh.mesh_dim_names, str(t.placements)) for t in kept(model, optimizer)}


NATIVE = {(AXES, "(Replicate(), Shard(dim=0))")}
ALONE = {(("shard",), "(Shard(dim=0),)")}


# ---- the same as on the shard axis alone -----------------------------------------------------------------------------

SYNCS: dict[str, Callable[[], Sync]] = {
    "dense": every_step,
    "int8 feedback": lambda: every_step(compress=error_feedback(quantize(bits=8, block=16))),
    "diloco": lambda: diloco(every_steps=3),
    "streaming": lambda: streaming_diloco(every_steps=4, overlap_steps=1, layers_per_fragment=0),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def torchs_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.requires_grad]
    return [
        torch.optim.Muon(matrices, lr=0.01),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01),
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": adamw,
    "muon": lambda model: inner.muon(model, lr=0.01),
    "torch's muon": torchs_muon,
}


def both_ways(sync: str, optimizer: str) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of this rank after training on the mesh of both axes, and on the shard axis."""
    mesh, results = hybrid_mesh(), []
    for native in (True, False):
        model = sharded(mesh if native else mesh["shard"])
        made = OPTIMIZERS[optimizer](model)
        before = list(model.parameters())
        attached = attach(
            model, made, SYNCS[sync](), replicate_group=None if native else mesh.get_group("replicate")
        )  # fmt: skip
        for step in range(8):
            backward(model, step)
            attached.step()
        assert laid_out(model, attached.pieces.optimizer) == ALONE
        attached.close_round()
        optimizer_of_all = attached.pieces.optimizer
        attached.detach()
        assert laid_out(model, optimizer_of_all) == (NATIVE if native else ALONE)
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
        results.append(locals_of(model))
    return results[0], results[1]


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", pytest.param("torch's muon", marks=torch_versions.MUON)])
def test_it_is_the_shard_axis_alone_to_the_bit(pool: WorkerPool, optimizer: str, sync: str) -> None:
    rows = pool.run(both_ways, sync, optimizer, world=4)
    for native, alone in rows:
        assert equal(native, alone)
    assert equal(rows[0][0], rows[2][0]) and equal(rows[1][0], rows[3][0]), "after a round replicas are equal"


def moved_by_torchs_muon() -> list[tuple[Tensor, Tensor]]:
    """How a step from the same gradients moves matrices cut over two ranks, and whole ones."""
    model, plain = sharded(hybrid_mesh((1, 2)), Net(bias=False)), Net(bias=False)
    cut, whole = ([p for p in m.parameters() if p.requires_grad] for m in (model, plain))
    before = [p.detach().clone() for p in whole]
    sync = attach(model, torch.optim.Muon(cut, lr=0.01), every_step())
    backward(model, 0)
    for number, (mine, its) in enumerate(zip(cut, whole, strict=True)):
        its.grad = torch.randn(*its.shape, generator=torch.Generator().manual_seed(number))
        mine.grad = distribute_tensor(its.grad, mine.device_mesh, mine.placements)  # type: ignore[attr-defined]
    sync.step()
    torch.optim.Muon(whole, lr=0.01).step()
    after = [cast(DTensor, p).full_tensor().detach() for p in cut]
    return [(a - p, b.detach() - p) for a, b, p in zip(after, whole, before, strict=True)]


@torch_versions.MUON
def test_torchs_muon_orthogonalizes_what_is_cut_as_a_whole(pool: WorkerPool) -> None:
    for moved in pool.run(moved_by_torchs_muon, world=2):
        for cut, whole in moved:  # the rows of each rank for themselves would be a third off, and more
            assert (cut - whole).norm() < 0.1 * whole.norm(), "more than bf16 explains"


# ---- optimizers made before stay valid, and so does the model after --------------------------------------------------


def in_the_middle(factor: float | None) -> tuple[list[float], list[float], bool]:
    """Losses of native HSDP, the same with a dense sync in the middle third; whether a scheduler's rate arrived."""
    mesh, results, arrived = hybrid_mesh(), [], False
    for with_sync in (False, True):
        model = sharded(mesh)
        if factor is not None:
            for unit in (m for m in model.modules() if isinstance(m, FSDPModule)):
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
                unit.set_gradient_divide_factor(factor)
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        losses = []
        for step in range(9):
            if with_sync and step == 3:
                sync = attach(model, optimizer, every_step())
            losses.append(backward(model, step))
            if with_sync and 3 <= step < 6:
                sync.step()
            else:
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            if with_sync and step == 5:
                sync.detach()
                assert laid_out(model, optimizer) == NATIVE
        arrived = optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**9)
        results.append(losses)
    return results[0], results[1], arrived


@pytest.mark.parametrize("factor", [None, 1.0])
def test_a_dense_sync_in_the_middle_of_native_training_is_native_training(
    pool: WorkerPool, factor: float | None
) -> None:
    for native, mixed, arrived in pool.run(in_the_middle, factor, world=4):
        assert native == pytest.approx(mixed, rel=1e-6) and arrived


def attached_after_a_look() -> bool:
    """A forward pass without backward leaves the root gathered."""
    model = sharded(hybrid_mesh())
    optimizer = adamw(model)
    with torch.no_grad():
        model(torch.ones(2, 7))
    sync = attach(model, optimizer, diloco(every_steps=2))
    train(model, sync, 4)
    with torch.no_grad():
        model(torch.ones(2, 7))
    sync.detach()
    backward(model, 0)
    return laid_out(model, optimizer) == NATIVE


def test_a_look_at_the_model_before_attach_and_detach_does_no_harm(pool: WorkerPool) -> None:
    assert all(pool.run(attached_after_a_look, world=4))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


WHEN = ("before", "attached", "after")


def through_dcp(first: str) -> list[bool]:
    """Saved ``first``, with a sync attached or not, and loaded so in each of ``WHEN``; whether all of it is there."""
    mesh, path, filled = hybrid_mesh(), folder(), []
    for number, when in enumerate((first, *WHEN)):
        model = sharded(mesh)
        optimizer = adamw(model)
        sync = attach(model, optimizer, every_step()) if when != "before" else None
        for step in range(3):
            if number == 0 or when == "after":
                backward(model, step)
                sync.step() if sync else optimizer.step()
                optimizer.zero_grad()
        if sync and when == "after":
            sync.detach()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if number == 0:
            save(state, checkpoint_id=path)
        else:
            load(state, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        filled.append([t.to_local().detach().clone() for t in kept(model, optimizer)])
        backward(model, 9)
        sync.step() if sync and when == "attached" else optimizer.step()
    return [equal(filled[0], loaded) for loaded in filled[1:]]


@pytest.mark.parametrize("first", WHEN)
def test_what_dcp_has_saved_is_loaded_with_and_without_a_sync(pool: WorkerPool, first: str) -> None:
    assert pool.run(through_dcp, first, world=4) == 4 * [[True] * len(WHEN)]


# ---- what is refused -------------------------------------------------------------------------------------------------


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    axes = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    net = Net()
    parallelize_module(net, axes["tensor"], {"first": ColwiseParallel()})
    return sharded(axes["replicate", "shard"], net)


def spmd(mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import DataParallelMeshDims

    net = Net()
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = distribute_tensor(parameter.detach(), mesh, [Replicate(), Replicate()])
            setattr(module, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    return sharded(mesh, net, dp_mesh_dims=DataParallelMeshDims(shard="shard", replicate="replicate"))


def of_two_meshes(mesh: DeviceMesh) -> nn.Module:
    net = Net()
    crossed = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=AXES)
    fully_shard(net.head, mesh=crossed)
    return sharded(mesh, net)


def of_two_shard_axes(mesh: DeviceMesh) -> nn.Module:
    net = Net()
    fully_shard(net.head, mesh=init_device_mesh("cpu", (4,)))
    return sharded(mesh, net)


def with_a_whole_parameter(mesh: DeviceMesh) -> nn.Module:
    net = Net()
    return sharded(mesh, net, ignored_params={net.head.bias})


MODELS: dict[str, tuple[Callable[[DeviceMesh], nn.Module], str]] = {
    "another group": (sharded, "leave replicate_group out: attach takes the mesh's"),
    "tensor parallelism": (tensor_parallel, "tensor parallelism beside FSDP2, or expert"),
    "SPMD": (spmd, "sharded with dp_mesh_dims"),
    "two meshes": (of_two_meshes, "replicate axes of different ranks"),
    "two shard axes": (of_two_shard_axes, "are sharded over the ranks [0, 1, 2, 3], others over"),
    "ignored parameters": (with_a_whole_parameter, "leave ignored_params out"),
}


def refused(case: str) -> tuple[str, bool]:
    """What is said, and whether the model is as it was."""
    mesh = hybrid_mesh()
    world = dist.group.WORLD
    model = MODELS[case][0](mesh)
    before = [str(p.device_mesh) + str(p.placements) for p in model.parameters() if isinstance(p, DTensor)]
    optimizer = adamw(model)
    try:
        attach(model, optimizer, every_step(), replicate_group=world if case == "another group" else None)
    except ValueError as error:
        after = [str(p.device_mesh) + str(p.placements) for p in model.parameters() if isinstance(p, DTensor)]
        dist.barrier()
        return str(error), before == after
    return "attached", False


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=torch_versions.MESH_DIMS if case == "SPMD" else ()) for case in MODELS]
)
def test_what_is_not_served_is_told_and_left_as_it_was(pool: WorkerPool, case: str) -> None:
    for message, same in pool.run(refused, case, world=4):
        assert MODELS[case][1] in message, message
        assert same


def resharded_to_fewer() -> str:
    model = sharded(hybrid_mesh((1, 4)), reshard_after_forward=2)
    try:
        attach(model, adamw(model), every_step())
    except ValueError as error:
        return str(error)
    return "attached"


def test_a_third_mesh_for_the_backward_pass_is_refused(pool: WorkerPool) -> None:
    for message in pool.run(resharded_to_fewer, world=4):
        assert "reshard_after_forward=True or False" in message


def the_same_group_given() -> bool:
    mesh = hybrid_mesh()
    model = sharded(mesh)
    sync = attach(model, adamw(model), every_step(), replicate_group=mesh.get_group("replicate"))
    train(model, sync, 1)
    sync.detach()
    return True


def test_the_meshs_own_group_may_be_given(pool: WorkerPool) -> None:
    assert all(pool.run(the_same_group_given, world=4))


def refused_later() -> bool:
    """Ranks with other syncs: told when the model is on its shard axis already."""
    model = sharded(hybrid_mesh())
    optimizer = adamw(model)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="another sync"):
        attach(model, optimizer, diloco(every_steps=2 + dist.get_rank()))
    return laid_out(model, optimizer) == NATIVE


class Muon(torch.optim.SGD):
    """One that knows nothing of shards."""


def refused_for_its_optimizer() -> bool:
    """And the optimizer may be stepped again."""
    model = sharded(hybrid_mesh())
    optimizer = Muon(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="orthogonalizes whole matrices"):
        attach(model, [optimizer], every_step())
    backward(model, 0)
    optimizer.step()
    return laid_out(model, optimizer) == NATIVE


def attached_twice() -> bool:
    model = sharded(hybrid_mesh())
    optimizer = adamw(model)
    sync = attach(model, optimizer, diloco(every_steps=2))
    with pytest.raises(RuntimeError, match=r"a sync is attached to this model already"):
        attach(model, optimizer, every_step())
    train(model, sync, 3)
    alone = laid_out(model, optimizer) == ALONE
    sync.detach()
    return alone and laid_out(model, optimizer) == NATIVE


def dropped() -> bool:
    """A sync that was never detached leaves the model on its shard axis; the next one puts it back."""
    model = sharded(hybrid_mesh())
    attach(model, adamw(model), diloco(every_steps=2))
    gc.collect()
    optimizer = adamw(model)
    attach(model, optimizer, every_step()).detach()
    return laid_out(model, optimizer) == NATIVE


@pytest.mark.parametrize("case", [refused_later, refused_for_its_optimizer, attached_twice, dropped])
def test_the_model_gets_its_mesh_again(pool: WorkerPool, case: Callable[[], bool]) -> None:
    assert all(pool.run(case, world=4))


def kept_from_before(what: str) -> str:
    """What is said where something that `attach` does not know was made on the mesh of both axes."""
    model = sharded(hybrid_mesh())
    optimizer, other = (
        torch.optim.AdamW(p, lr=0.01)
        for p in (
            model.get_submodule("layers").parameters(),
            [*model.get_submodule("first").parameters(), *model.get_submodule("head").parameters()],
        )
    )
    average = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    other.step()
    model.zero_grad()
    with pytest.warns(RuntimeWarning, match="are not in the optimizer"):
        sync = attach(model, optimizer, every_step())
    backward(model, 1)
    sync.step()
    try:
        if what == "an average":
            torch._foreach_lerp_(average, list(model.parameters()), 0.1)
        else:
            other.step()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("what", ["an average", "another optimizer"])
def test_what_lies_on_the_mesh_of_before_is_not_mixed_in_silently(pool: WorkerPool, what: str) -> None:
    for message in pool.run(kept_from_before, what, world=4):
        assert "mesh" in message, message


def of_another_size() -> str:
    """The model is sharded over one rank, and two ranks are a replica."""
    model = sharded(hybrid_mesh((2, 1))["shard"])
    channel = build_mesh(1, 2).channel
    try:
        pieces_of(model, adamw(model), channel, overlap=False)
    except ValueError as error:
        return str(error)
    return ""


def test_a_replica_is_sharded_over_all_of_its_ranks(pool: WorkerPool) -> None:
    for message in pool.run(of_another_size, world=2):
        assert "and a replica has 2" in message
