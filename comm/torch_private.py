"""Every private name of torch that the hooks and the trainer touch, each behind a function or a property of this file.

torch has public functions for what a model needs, and few for what stands between replicas. `NAMES` lists what is used
instead; a test asks the installed torch for each of them, and `_get` and `_set` say what is missing. What only newer
versions have is asked for here, too, and used where it is there. Launchers, which import nothing of ours, override
methods of torch's elastic agent in a file of their own (``launchers/elastic_agent.py``).

Source: torch 2.8 to 2.14: distributed/fsdp/_fully_shard, distributed/distributed_c10d.py, nn/parallel/distributed.py,
optim/lr_scheduler.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Public classes of torch.distributed, which exports them without a word for type checkers.
from torch._C._distributed_c10d import GradBucket, HashStore, ProcessGroupGloo, Store, TCPStore
from torch.distributed import distributed_c10d as c10d
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:  # kernels and compressors need this file too, and not what takes seconds to import
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Placement
    from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "BatchNorm", "GradBucket", "HashStore", "ProcessGroupGloo", "Store", "TCPStore", "TorchDispatchMode",
    "is_traceable_wrapper_subclass", "tree_leaves", "tree_map_only",
]  # fmt: skip  # those of torch that others take from here

MESH_INFOS = "torch.distributed.fsdp._fully_shard._fsdp_common"
COLLECTIVES = "torch.distributed.fsdp._fully_shard._fsdp_collectives"
C10D = "torch.distributed.distributed_c10d"
CACHE_FOLDERS = "torch._inductor.runtime.cache_dir_utils"
INDUCTOR_SETTINGS = "torch._inductor.config"
DTENSOR_CACHES = "torch.distributed.tensor.debug"
FAKE_TENSORS = "torch._subclasses.fake_tensor"

ZEROS_OF_UNUSED = "set_reduce_scatter_unused_params"
"""The method of an FSDP2 model that has torch make zeros of missing gradients, in newer versions: `zeros_of_unused`."""

NAMES: Mapping[str, tuple[str, ...]] = {
    MESH_INFOS: ("FSDPMeshInfo", "HSDPMeshInfo"),
    COLLECTIVES: ("_get_gradient_divide_factors",),
    "torch._C": ("DisableTorchFunction", "DisableTorchFunctionSubclass", "_current_graph_task_id"),
    "torch.autograd.Variable": ("_execution_engine",),
    "FSDPModule": ("_get_fsdp_state",),
    "FSDPState": ("_fsdp_param_group", "_state_ctx"),
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
    "HSDPMeshInfo": ("mesh", "replicate_process_group", "shard_mesh_dim", "shard_process_group"),
    "DTensor": ("_op_dispatcher", "_spec"),
    "DistributedDataParallel": ("_join_config",),
    C10D: (
        "_get_default_group", "_get_object_coll_device", "_new_process_group_helper", "_store_based_barrier", "_world",
    ),
    "World": ("pg_group_ranks", "pg_map", "pg_to_tag", "tags_to_pg"),
    "ProcessGroup": ("_device_types", "_get_backend", "_get_sequence_number_for_group", "bound_device_id"),
    "ProcessGroupGloo": ("_Options",),
    "ProcessGroupGloo.Options": ("_devices", "_timeout"),
    "Optimizer": ("_opt_called",),
    "Optimizer.step": ("_wrapped_by_lr_sched",),
    "Parameter": ("_in_backward_optimizers",),
    "Tensor": ("_make_subclass", "_values", "_version"),
    "Module": ("_forward_hooks", "_forward_pre_hooks", "_non_persistent_buffers_set", "_parameters"),
    "torch._dynamo": ("maybe_mark_dynamic",),
    CACHE_FOLDERS: ("default_cache_dir",),
    INDUCTOR_SETTINGS: ("get_config_copy",),
    FAKE_TENSORS: ("FakeTensorMode",),
    "OpOverload": ("_overloadpacket",),
    "torch.ops.aten": (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}  # fmt: skip
"""The names by their owner: a module, or a class of torch's."""
NEWER_NAMES: Mapping[str, tuple[str, ...]] = {
    # fully_shard(dp_mesh_dims=): a mesh that has axes of tensor parallelism and others beside fully_shard's own.
    # set_separate_reduce_scatter_group(): gradients reduced over another group than parameters are gathered over.
    "HSDPMeshInfo": ("is_spmd_mesh", "reduce_scatter_process_group"),
    "FSDPState": ("_fsdp_param_groups",),  # several meshes within a unit: ShardPlacementResult
    "FSDPModule": (ZEROS_OF_UNUSED,),
    C10D: ("GroupName",),
    DTENSOR_CACHES: ("_clear_sharding_prop_cache",),
    "ProcessGroupGloo": ("set_timeout",),
}  # fmt: skip
"""Names of what torch 2.8 has not, used where they are there."""

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


def _newer(owner: object, name: str) -> Any:
    """``owner``'s attribute; None where this torch is older than it."""
    return getattr(owner, name, None)


def _missing(owner: object, name: str) -> str:
    label = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
    return (
        f"torch {torch.__version__} has no {name} in its {label}, which dtrain uses "
        "(dtrain/comm/torch_private.py); take a version of torch that dtrain was tested with "
        "(docs/torch_versions.md)"
    )


# ---- the backward pass -----------------------------------------------------------------------------------------------


def backward_id() -> int:
    """A number of the backward pass under way; -1 outside of one."""
    return int(_get(torch._C, "_current_graph_task_id")())


def as_subclass(owner: type[Tensor], tensor: Tensor) -> Any:
    """``tensor`` as an instance of a subclass that is made otherwise, without a copy."""
    return _get(Tensor, "_make_subclass")(owner, tensor)


def without_subclasses() -> AbstractContextManager[None]:
    """A block in which torch takes tensors of subclasses for plain ones."""
    block: AbstractContextManager[None] = _get(torch._C, "DisableTorchFunctionSubclass")()
    return block


def without_overrides() -> AbstractContextManager[None]:
    """A block in which torch asks neither subclasses of tensors nor modes."""
    block: AbstractContextManager[None] = _get(torch._C, "DisableTorchFunction")()
    return block


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
        return cast("DTensor", _get(self._param, "sharded_param"))

    @property
    def placement(self) -> Placement:
        """Along the shard axis."""
        return cast("Placement", _get(self._param, "fsdp_placement"))

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
        return cast("DTensor", _get(self._param, "to_sharded_dtensor")(local))

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
        return bool(_newer(self.mesh_info, "is_spmd_mesh"))

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
        if (gradients := _newer(info, "reduce_scatter_process_group")) is not None:
            _set(alone, "reduce_scatter_process_group", gradients)
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
    from torch.distributed.tensor import Replicate

    return (Replicate(), along_shards) if _get(info, "mesh").ndim == 2 else (along_shards,)


def parameter_groups(model: nn.Module) -> Iterator[tuple[str, ParameterGroup]]:
    """All groups of an FSDP2 model, once, each with the name of its (first) module."""
    from torch.distributed.fsdp import FSDPModule

    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state = _get(module, "_get_fsdp_state")()
        groups = _newer(state, "_fsdp_param_groups")
        if groups is None:
            only = _get(state, "_fsdp_param_group")
            groups = [] if only is None else [only]
        for group in map(ParameterGroup, groups):
            if group.key not in seen:
                seen.add(group.key)
                yield name, group


def zeros_of_unused(model: FSDPModule, wanted: bool) -> None:
    """Have torch make zeros of gradients that some parameters of a unit lack, or not.

    Raises ``RuntimeError`` where they are ``wanted`` and this torch cannot.
    """
    switch = _newer(model, ZEROS_OF_UNUSED)
    if switch is not None:
        switch(wanted)
    elif wanted:
        raise RuntimeError(
            f"torch {torch.__version__} has no {ZEROS_OF_UNUSED}, so a unit of fully_shard needs a gradient of each of "
            f"its parameters; {without_zeros_of_unused()}"
        )


def without_zeros_of_unused() -> str:
    """What a user of this torch can do about a unit of which some parameters had no part in a step."""
    own_unit = "give fully_shard each module that a step may leave out, such as an expert, as a unit of its own"
    from torch.distributed.fsdp import FSDPModule

    if hasattr(FSDPModule, ZEROS_OF_UNUSED):
        return f"{own_unit}, or call {ZEROS_OF_UNUSED}(True) on the model: torch then makes zeros of those missing"
    return f"{own_unit} (a newer torch can make zeros of those missing: {ZEROS_OF_UNUSED})"


# ---- DistributedDataParallel -----------------------------------------------------------------------------------------


def joins_unevenly(model: DistributedDataParallel) -> bool:
    """Whether the model is within ``join()``, and ranks may make different numbers of steps in it."""
    config = _get(model, "_join_config")
    return bool(config.enable and not config.throw_on_early_termination)


# ---- process groups --------------------------------------------------------------------------------------------------


def default_group() -> dist.ProcessGroup:
    """Raises ``ValueError`` where there is none."""
    return cast(dist.ProcessGroup, _get(c10d, "_get_default_group")())


def open_groups() -> list[dist.ProcessGroup]:
    """All groups of this process that were not destroyed, also those that it is not in."""
    return list(_get(_get(c10d, "_world"), "pg_map"))


def own_group(name: str, ranks: Sequence[int], backend: str | None, timeout: timedelta) -> dist.ProcessGroup:
    """A new group of ``ranks``, which alone call it, once for each ``name``. ``backend``: the default group's if None.

    It returns when all have connected: a rank that freed the group earlier would break the others' connections.
    """
    default = default_group()
    default_backend, store = _get(_get(c10d, "_world"), "pg_map")[default]
    named = (_newer(c10d, "GroupName") or str)(name)
    # A default group that is bound to a device would split its communicator, for which all of its ranks are needed.
    bound = _get(default, "bound_device_id")
    _set(default, "bound_device_id", None)
    try:
        group, group_store = _get(c10d, "_new_process_group_helper")(
            len(ranks), list(ranks).index(dist.get_rank()), list(ranks), dist.Backend(backend or default_backend),
            store, named, timeout=timeout, group_desc="dtrain",
        )  # fmt: skip
    finally:
        _set(default, "bound_device_id", bound)
    _get(_get(c10d, "_world"), "pg_group_ranks")[group] = {rank: index for index, rank in enumerate(ranks)}
    assert isinstance(group, dist.ProcessGroup)
    _get(c10d, "_store_based_barrier")(dist.get_rank(), group_store, named, len(ranks), timeout)
    return group


def fake_tensors(**options: bool) -> AbstractContextManager[Any]:
    """Torch's FakeTensorMode: within it tensors have shapes, dtypes and a device, and no memory."""
    mode: AbstractContextManager[Any] = _get(import_module(FAKE_TENSORS), "FakeTensorMode")(**options)
    return mode


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether ``module``'s own buffer of that name is in its state."""
    return buffer not in _get(module, "_non_persistent_buffers_set")


def packet_of(op: Any) -> Any:
    """The operator, as ``torch.ops.aten.add``, that an overload of it belongs to."""
    return _get(op, "_overloadpacket")


def attention_on_cpu() -> tuple[Any, Any]:
    """The operators of scaled dot-product attention on a processor, forward and backward."""
    return (
        _get(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
        _get(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"),
    )


def destroy_group(group: dist.ProcessGroup) -> None:
    """``dist.destroy_process_group``, after which nothing is left: torch keeps an empty list of each group's tag."""
    world = _get(c10d, "_world")
    tag = _get(world, "pg_to_tag").get(group, "")
    dist.destroy_process_group(group)
    tags: dict[str, list[dist.ProcessGroup]] = _get(world, "tags_to_pg")
    if tag in tags and not tags[tag]:
        del tags[tag]


def forget_meshes() -> None:
    """For a process that starts torch.distributed again: what DTensor remembers of the layouts of earlier operations
    names their meshes, whose groups are gone, and a new mesh of the same ranks is taken for one of them.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    if (clear := _newer(import_module(DTENSOR_CACHES), "_clear_sharding_prop_cache")) is not None:
        clear()
        return
    from torch.distributed.tensor import DTensor

    _get(DTensor, "_op_dispatcher").sharding_propagator.propagate_op_sharding.cache.cache_clear()


def backends_of(group: dist.ProcessGroup) -> list[tuple[torch.device, Any]]:
    """What moves the tensors of each kind of device in ``group``."""
    devices = [torch.device(device) for device in _get(group, "_device_types")]
    return [(device, _get(group, "_get_backend")(device)) for device in devices]


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of ``group`` waits."""
    backends = [backend for _, backend in backends_of(group)]
    timeouts = [_get(backend.options, "_timeout") for backend in backends if hasattr(backend, "options")]
    return max(timeouts, default=dist.default_pg_timeout)


def collectives_begun(group: dist.ProcessGroup) -> int:
    """How many collectives of ``group`` this rank has begun."""
    return int(_get(group, "_get_sequence_number_for_group")())


def device_of_objects(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors lie that carry objects over ``group``, the default one by default."""
    return torch.device(_get(c10d, "_get_object_coll_device")(group))


def gloo_group(
    store: Store, rank: int, size: int, *, connect: timedelta, timeout: timedelta, **device: str
) -> ProcessGroupGloo:
    """A gloo group outside of torch's registry, which listens on a device: ``interface=NAME`` or ``hostname=NAME``.

    ``connect``: how long ranks wait for each other here. ``timeout``: of a collective; before torch 2.9 it counts for
    both. Raises ``RuntimeError`` or ``DistStoreError`` if a rank does not come.
    """
    options = _get(ProcessGroupGloo, "_Options")()
    _set(options, "_devices", [ProcessGroupGloo.create_device(**device)])
    _set(options, "_timeout", connect if hasattr(ProcessGroupGloo, "set_timeout") else timeout)
    group = ProcessGroupGloo(store, rank, size, options)
    if (set_timeout := _newer(group, "set_timeout")) is not None:
        set_timeout(timeout)
    return group


# ---- optimizers and their schedulers ---------------------------------------------------------------------------------


def mark_stepped(optimizer: object) -> None:
    """For the optimizer's scheduler, which warns where it is stepped before the optimizer ever was."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def copy_scheduler_mark(original: object, step: object) -> None:
    """Mark ``step`` as schedulers have marked the ``original`` step of an optimizer."""
    if hasattr(original, "_wrapped_by_lr_sched"):
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def steps_in_backward(parameter: Tensor) -> bool:
    """Whether ``_apply_optimizer_in_backward`` has given the parameter an optimizer."""
    return bool(getattr(parameter, "_in_backward_optimizers", None))


# ---- tensors and modules ---------------------------------------------------------------------------------------------


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written to in place."""
    return int(_get(tensor, "_version"))


def stored_values(sparse: Tensor) -> Tensor:
    """Of a sparse tensor, which need not be coalesced."""
    return cast(Tensor, _get(sparse, "_values")())


def parameters_by_module(model: nn.Module) -> Iterator[Tensor]:
    """As ``model.parameters()``, twice where tied, without the names that take most of its time."""
    modules = [model]
    while modules:
        module = modules.pop()
        yield from (p for p in _get(module, "_parameters").values() if p is not None)
        modules += module.children()


def clear_forward_hooks(module: nn.Module) -> None:
    """Remove all of them, whoever registered them."""
    _get(module, "_forward_hooks").clear()
    _get(module, "_forward_pre_hooks").clear()


# ---- the compiler ----------------------------------------------------------------------------------------------------


def mark_any_size(tensor: Tensor, dim: int) -> None:
    """Have code that is compiled for ``tensor`` serve any size of ``dim``, where it can."""
    _get(import_module("torch._dynamo"), "maybe_mark_dynamic")(tensor, dim)


def default_cache_folder() -> str:
    """Where torch would cache compiled code."""
    return str(_get(import_module(CACHE_FOLDERS), "default_cache_dir")())


def compiles_with(settings: Sequence[str]) -> bool:
    """Whether torch's compiler knows all of these settings."""
    known = _get(import_module(INDUCTOR_SETTINGS), "get_config_copy")()
    return all(name in known for name in settings)
