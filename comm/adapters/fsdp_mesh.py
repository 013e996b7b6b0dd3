"""Native HSDP under a sync: ``fully_shard`` on a mesh with a replicate axis and a shard axis.

Its own all-reduce between replicas would remain, and DTensors with a replicate axis claim that replicas are equal,
which under local updates they are not: an optimizer's matrix products would mix them. So the mesh of each unit becomes
its shard axis while a sync is attached. Parameters, gradients and the optimizer's state stay the same objects with the
same values, so optimizers and schedulers made before stay valid. Nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from dtrain.comm.ops import Place
from dtrain.comm.torch_private import MeshInfo, ParameterGroup, ShardedParameter, lay_out, parameter_groups


def reshard(model: nn.Module) -> None:
    """Let the model hold its sharded parameters: a forward pass without backward leaves units gathered, as the root."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def replicate_group_of(model: nn.Module, given: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The peers of this rank: with native HSDP those of the model's mesh, otherwise ``given``.

    Raises ``ValueError`` for meshes that are not served, and for a ``given`` group of other ranks than the mesh's.
    """
    require_servable_meshes(model)
    of_meshes = {
        tuple(_ranks(group.replicate_group)): (name, group.replicate_group)
        for name, group in parameter_groups(model)
        if group.replicate_group is not None
    }
    if not of_meshes:
        return given
    if len(of_meshes) > 1:
        raise ValueError(
            "the units of this model have replicate axes of different ranks: "
            + ", ".join(f"{name or 'the root'} {list(ranks)}" for ranks, (name, _) in of_meshes.items())
            + "; give fully_shard one mesh for all of them"
        )
    ((ranks, (_, group)),) = of_meshes.items()
    if given is not None and _ranks(given) != list(ranks):
        raise ValueError(
            f"replicate_group has ranks {_ranks(given)}, and the replicate axis of the mesh that fully_shard was given "
            f"has {list(ranks)}; leave replicate_group out: attach takes the mesh's"
        )
    return group


def shard_ranks(model: nn.Module) -> list[int] | None:
    """The ranks of this rank's replica; None for a model without a sharded parameter."""
    return next((_ranks(group.shard_group) for _, group in parameter_groups(model)), None)


def require_servable_meshes(model: nn.Module) -> None:
    """Raise ``ValueError`` unless ``fully_shard`` has cut all parameters along one shard axis and nothing else has."""
    ranks = shard_ranks(model)
    for name, group in parameter_groups(model):
        label = name or "the root"
        if group.of_all_axes:
            raise ValueError(
                f"{label} was sharded with dp_mesh_dims, on a mesh that has other axes than data parallelism's (SPMD); "
                "dtrain follows fully_shard's own axes: give it a mesh of a shard axis, or of a replicate and a shard "
                "axis, and leave dp_mesh_dims out"
            )
        if any(param.was_dtensor for param in group.parameters):
            raise ValueError(
                f"parameters of {label} were DTensors before fully_shard: tensor parallelism beside FSDP2, or expert "
                "parallelism. dtrain follows one shard axis; leave parallelize_module out and give fully_shard a mesh "
                "with all ranks of a replica"
            )
        if group.native is not None and group.reshards_to_fewer:
            raise ValueError(
                f"{label} was sharded with a number for reshard_after_forward, which with native HSDP makes a third "
                "mesh, of both axes; give reshard_after_forward=True or False, or fully_shard the shard axis alone, "
                'mesh=mesh["shard"], and attach replicate_group=mesh.get_group("replicate")'
            )
        if _ranks(group.shard_group) != ranks:
            raise ValueError(
                f"parameters of {label} are sharded over the ranks {_ranks(group.shard_group)}, others over {ranks} "
                "(shard_placement_fn, or another mesh=); dtrain follows one shard axis: shard all of them over the "
                "ranks of a replica"
            )


def require_whole_replicas(model: nn.Module, shard: Place) -> None:
    """Raise ``ValueError`` unless the model is sharded over all ranks of a replica."""
    ranks = shard_ranks(model)
    if ranks is not None and len(ranks) != shard.size:
        raise ValueError(
            f"the model is sharded over the ranks {ranks}, and a replica has {shard.size}; give fully_shard a mesh "
            "with all ranks of a replica"
        )


def to_shard_axis(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a model of native HSDP on the shard axis of its mesh, and what ``optimizer`` keeps of its parameters.

    Others stay as they are. Raises ``ValueError`` for meshes that are not served, before anything has changed.
    """
    require_servable_meshes(model)
    groups = [group for _, group in parameter_groups(model) if group.on_native]
    for group in groups:
        for param in group.parameters:
            _require_equal_on_replicas(_beside(param, optimizer))
    for group in groups:
        _move(group, group.shard_axis(), optimizer)
        _scale_divisor(group, 1 / _replicas(group))


def to_native(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Undo `to_shard_axis`."""
    for _, group in parameter_groups(model):
        if group.native is not None and not group.on_native:
            _move(group, group.native, optimizer)
            _scale_divisor(group, _replicas(group))


def _scale_divisor(group: ParameterGroup, factor: float) -> None:
    """A number to divide gradients by is meant for the sum over both axes. The sync takes the mean over replicas, so
    the sum over the shard axis is divided by less.
    """
    if group.divide_factor is not None:
        group.divide_factor *= factor


def _replicas(group: ParameterGroup) -> int:
    assert group.replicate_group is not None
    return group.replicate_group.size()


def _move(group: ParameterGroup, info: MeshInfo, optimizer: torch.optim.Optimizer) -> None:
    for param in group.parameters:
        for tensor in _beside(param, optimizer):
            _lay_out_on(tensor, info)
    group.place(info)


def _beside(param: ShardedParameter, optimizer: torch.optim.Optimizer) -> list[DTensor]:
    """A parameter's gradient and its state in the optimizer, where they lie on its mesh."""
    parameter = param.parameter
    values: list[Any] = [parameter.grad]
    if parameter in optimizer.state:
        values.append(optimizer.state[parameter])
    return [tensor for tensor in _dtensors(values) if tensor.device_mesh == parameter.device_mesh]


def _require_equal_on_replicas(tensors: Iterable[DTensor]) -> None:
    for tensor in tensors:
        if not tensor.placements[0].is_replicate():
            raise ValueError(
                f"a gradient, or what the optimizer keeps of a parameter, has shape {tuple(tensor.shape)} and lies as "
                f"{tensor.placements} on the mesh, so not every replica holds it; clear gradients with "
                "set_to_none=True before attach, or make the optimizer anew"
            )


def _lay_out_on(tensor: DTensor, info: MeshInfo) -> None:
    """Let ``tensor`` lie on the mesh of ``info``, which has one axis of two, or two of one."""
    placements = tensor.placements[1:] if info.mesh.ndim == 1 else (Replicate(), *tensor.placements)
    lay_out(tensor, info.mesh, tuple(placements))


def _dtensors(values: Iterable[Any]) -> Iterator[DTensor]:
    """All DTensors in nested lists and mappings."""
    for value in values:
        if isinstance(value, DTensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _dtensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _dtensors(value)


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return sorted(dist.get_process_group_ranks(group))
