"""Every private name of torch that the FSDP2 adapter touches, each behind a function or a property of this file.

``fully_shard`` has public functions for what a model needs, and few for what stands between replicas. `NAMES` lists
what is used instead; a test asks the installed torch for each of them, and `_get` and `_set` say what is missing.

Source: torch/distributed/fsdp/_fully_shard of torch 2.8, 2.13 and 2.14.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate

MESH_INFOS = "torch.distributed.fsdp._fully_shard._fsdp_common"
COLLECTIVES = "torch.distributed.fsdp._fully_shard._fsdp_collectives"

MESH_OF_ALL_AXES = "dp_mesh_dims" in inspect.signature(fully_shard).parameters
"""Whether ``fully_shard`` can be given a mesh that has axes of tensor parallelism and others beside its own."""
TWO_PROCESS_GROUPS = hasattr(FSDPModule, "set_separate_reduce_scatter_group")
"""Whether gradients may be reduced over another group than parameters are gathered over."""

NAMES: Mapping[str, tuple[str, ...]] = {
    MESH_INFOS: ("FSDPMeshInfo", "HSDPMeshInfo"),
    COLLECTIVES: ("_get_gradient_divide_factors",),
    "torch._C": ("_current_graph_task_id",),
    "torch.autograd.Variable": ("_execution_engine",),
    "FSDPModule": ("_get_fsdp_state",),
    "FSDPState": ("_fsdp_param_group", "_state_ctx"),  # and _fsdp_param_groups, in newer versions
    "FSDPStateContext": ("post_backward_final_callback_queued",),
    "FSDPParamGroup": (
        "_all_reduce_hook", "_reduce_scatter_process_group", "device", "force_sum_reduction_for_comms", "fsdp_params",
        "gradient_divide_factor", "mesh_info", "mp_policy", "post_forward_mesh_info",
    ),
    "FSDPParam": (
        "_sharding_spec", "_spmd_mesh", "_spmd_placements", "_unsharded_param", "fsdp_placement", "is_dtensor",
        "mesh_info", "padded_sharded_param_size", "post_forward_mesh_info", "sharded_param", "to_sharded_dtensor",
        "unsharded_accumulated_grad",
    ),
    "HSDPMeshInfo": (
        "mesh", "replicate_process_group", "shard_mesh_dim", "shard_process_group",
        *(["is_spmd_mesh"] if MESH_OF_ALL_AXES else []),
        *(["reduce_scatter_process_group"] if TWO_PROCESS_GROUPS else []),
    ),
    "DTensor": ("_spec",),
}  # fmt: skip
"""The names by their owner: a module, or a class of torch's."""

MeshInfo: TypeAlias = Any
"""torch's FSDPMeshInfo (a shard axis) or HSDPMeshInfo (a replicate axis before it)."""

NATIVE = "native_of_dtrain"
"""Where a mesh info that `ParameterGroup.shard_axis` has made keeps the one that it was made from."""


def _get(owner: object, name: str) -> Any:
    """``owner``'s attribute. Raises ``RuntimeError`` where this torch has none of that name."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(_missing(owner, name)) from None


def _set(owner: object, name: str, value: object) -> None:
    """Replace ``owner``'s attribute. Raises ``RuntimeError`` where this torch has none: a new one would do nothing."""
    if not hasattr(owner, name):
        raise RuntimeError(_missing(owner, name))
    setattr(owner, name, value)


def _missing(owner: object, name: str) -> str:
    label = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
    return (
        f"torch {torch.__version__} has no {name} in its {label}, which dtrain's adapter for fully_shard uses "
        "(dtrain/comm/adapters/torch_private.py); take a version of torch that dtrain was tested with"
    )


# ---- the backward pass -----------------------------------------------------------------------------------------------


def backward_id() -> int:
    """A number of the backward pass under way; -1 outside of one."""
    return int(_get(torch._C, "_current_graph_task_id")())


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` at the end of the backward pass under way."""
    _get(torch.autograd.Variable, "_execution_engine").queue_callback(callback)


def outer_backward_goes_on(root: FSDPModule) -> bool:
    """Whether FSDP2's backward pass has not ended: one of a reentrant checkpoint within it may end before."""
    context = _get(_get(root, "_get_fsdp_state")(), "_state_ctx")
    return bool(_get(context, "post_backward_final_callback_queued"))


# ---- parameters ------------------------------------------------------------------------------------------------------


class ShardedParameter:
    """A parameter of an FSDP2 unit."""

    def __init__(self, param: Any) -> None:
        self._param = param

    @property
    def parameter(self) -> DTensor:
        """What optimizers step."""
        return cast(DTensor, _get(self._param, "sharded_param"))

    @property
    def placement(self) -> Placement:
        """Along the shard axis."""
        return cast(Placement, _get(self._param, "fsdp_placement"))

    @property
    def was_dtensor(self) -> bool:
        """Whether something else had distributed it before ``fully_shard``."""
        return bool(_get(self._param, "is_dtensor"))

    @property
    def padded_numel(self) -> int:
        """Elements that it has in the unit's flat gradient."""
        return int(_get(self._param, "padded_sharded_param_size").numel())

    @property
    def unreduced(self) -> bool:
        """Whether it has a gradient that no pass has reduced over the shard axis yet."""
        if _get(self._param, "unsharded_accumulated_grad") is not None:
            return True
        # It has none before it was gathered for the first time.
        return hasattr(self._param, "_unsharded_param") and _get(self._param, "_unsharded_param").grad is not None

    def sharded(self, local: Tensor) -> DTensor:
        """``local``, of this rank's shape, as a tensor sharded as the parameter."""
        return cast(DTensor, _get(self._param, "to_sharded_dtensor")(local))

    def place(self, info: MeshInfo, post_forward: MeshInfo | None) -> None:
        """Have the parameter, and gradients from now on, lie on the mesh of ``info``; their values stay."""
        placed = self.parameter
        lay_out(placed, _get(info, "mesh"), placements_on(info, self.placement))
        _set(self._param, "mesh_info", info)
        _set(self._param, "post_forward_mesh_info", post_forward)
        _set(self._param, "_spmd_mesh", placed.device_mesh)
        _set(self._param, "_spmd_placements", placed.placements)
        _set(self._param, "_sharding_spec", _get(placed, "_spec"))


def lay_out(tensor: DTensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> None:
    """Let ``tensor``, the same object with the same values on this rank, lie on another mesh."""
    spec = _get(tensor, "_spec")  # a DTensorSpec
    _set(tensor, "_spec", type(spec)(mesh, placements, tensor_meta=spec.tensor_meta))


# ---- units -----------------------------------------------------------------------------------------------------------


class ParameterGroup:
    """What FSDP2 gathers and reduces together: the parameters of a module, or those of them that are on one mesh."""

    def __init__(self, group: Any) -> None:
        self._group = group

    @property
    def key(self) -> int:
        """The same for modules that were given to ``fully_shard`` together."""
        return id(self._group)

    @property
    def parameters(self) -> list[ShardedParameter]:
        return [ShardedParameter(param) for param in _get(self._group, "fsdp_params")]

    @property
    def device(self) -> torch.device:
        return torch.device(_get(self._group, "device"))

    @property
    def reduce_dtype(self) -> torch.dtype:
        """Of the gradient that the hook is given."""
        policy = _get(self._group, "mp_policy")
        dtype: torch.dtype = policy.reduce_dtype or policy.param_dtype or self.parameters[0].parameter.dtype
        return dtype

    @property
    def divisor_after_hook(self) -> float | None:
        """What FSDP2 divides by after the hook, as where it reduces in fp16; None for nothing."""
        group = self._group
        _, after, _, _ = _get(import_module(COLLECTIVES), "_get_gradient_divide_factors")(
            _get(group, "_reduce_scatter_process_group"), None, self.reduce_dtype, self.device.type,
            _get(group, "gradient_divide_factor"), _get(group, "force_sum_reduction_for_comms"),
        )  # fmt: skip
        return None if after in (None, 1) else after

    def set_hook(self, hook: Callable[[Tensor], None] | None) -> None:
        """Have ``hook`` called with this rank's flat gradient, reduced over the shard axis. ``set_all_reduce_hook``
        does so for modules of one group only, and cannot remove it.
        """
        _set(self._group, "_all_reduce_hook", hook)

    @property
    def divide_factor(self) -> float | None:
        """What gradients are divided by in place of the number of ranks; None for that number."""
        return cast("float | None", _get(self._group, "gradient_divide_factor"))

    @divide_factor.setter
    def divide_factor(self, factor: float | None) -> None:
        _set(self._group, "gradient_divide_factor", factor)

    # ---- its mesh ----

    @property
    def mesh_info(self) -> MeshInfo:
        return _get(self._group, "mesh_info")

    @property
    def shard_group(self) -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, _get(self.mesh_info, "shard_process_group"))

    @property
    def native(self) -> MeshInfo | None:
        """Its mesh of a replicate and a shard axis, also while it lies on the shard axis alone; None if it has none."""
        info = self.mesh_info
        return (
            info if isinstance(info, _get(import_module(MESH_INFOS), "HSDPMeshInfo")) else getattr(info, NATIVE, None)
        )

    @property
    def on_native(self) -> bool:
        """Whether it lies on a mesh with a replicate axis, over which torch all-reduces."""
        return self.native is not None and self.native is self.mesh_info

    @property
    def replicate_group(self) -> dist.ProcessGroup | None:
        """Of its `native` mesh."""
        return None if self.native is None else cast(dist.ProcessGroup, _get(self.native, "replicate_process_group"))

    @property
    def of_all_axes(self) -> bool:
        """Whether ``fully_shard`` was given a mesh with further axes, and told which are its own (``dp_mesh_dims``)."""
        return MESH_OF_ALL_AXES and bool(_get(self.mesh_info, "is_spmd_mesh"))

    @property
    def reshards_to_fewer(self) -> bool:
        """Whether parameters are gathered for the backward pass from fewer ranks than hold them."""
        post_forward = _get(self._group, "post_forward_mesh_info")
        return post_forward is not None and post_forward != self.mesh_info

    def shard_axis(self) -> MeshInfo:
        """Its `native` mesh without the replicate axis."""
        info = self.native
        mesh, dim = _get(info, "mesh"), _get(info, "shard_mesh_dim")
        alone = _get(import_module(MESH_INFOS), "FSDPMeshInfo")(mesh=mesh[mesh.mesh_dim_names[dim]], shard_mesh_dim=0)
        if TWO_PROCESS_GROUPS:
            _set(alone, "reduce_scatter_process_group", _get(info, "reduce_scatter_process_group"))
        setattr(alone, NATIVE, info)
        return alone

    def place(self, info: MeshInfo) -> None:
        """Let its parameters lie on the mesh of ``info``, which must cut them in the same way."""
        before, post_forward = self.mesh_info, _get(self._group, "post_forward_mesh_info")
        if post_forward is not None and post_forward == before:
            post_forward = info
        for param in self.parameters:
            param.place(info, post_forward)
        _set(self._group, "mesh_info", info)
        _set(self._group, "post_forward_mesh_info", post_forward)


def placements_on(info: MeshInfo, along_shards: Placement) -> tuple[Placement, ...]:
    """The placements of a parameter that is cut ``along_shards`` on a mesh, whose replicate axis comes first."""
    return (Replicate(), along_shards) if _get(info, "mesh").ndim == 2 else (along_shards,)


def parameter_groups(model: nn.Module) -> Iterator[tuple[str, ParameterGroup]]:
    """All groups of an FSDP2 model, once, each with the name of its (first) module."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state = _get(module, "_get_fsdp_state")()
        if hasattr(state, "_fsdp_param_groups"):
            groups = _get(state, "_fsdp_param_groups")
        else:
            only = _get(state, "_fsdp_param_group")
            groups = [] if only is None else [only]
        for group in map(ParameterGroup, groups):
            if group.key not in seen:
                seen.add(group.key)
                yield name, group
