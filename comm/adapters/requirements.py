"""What `attach` refuses before anything is changed or sent, and how to do it instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.adapters.wrappers import named_parameters
from dtrain.comm.runtime.method import Sync
from dtrain.comm.torch_private import steps_in_backward


def is_plain(model: nn.Module) -> bool:
    """Whether every rank holds ``model`` whole, with nothing around it that communicates."""
    if isinstance(model, list | tuple):
        raise TypeError(
            f"attach got a {type(model).__name__} of {len(model)} models; give the model itself. Of a trainer that "
            "keeps the parts of a pipeline, such as torchtitan's model_parts, it is the only one: model_parts[0]; "
            "pipelines of several parts are not served"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach got a {type(model).__name__}; give the model, an nn.Module")
    if hasattr(model, "zero_optimization_stage") or isinstance(model, DistributedDataParallel | FSDPModule):
        return False
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | FSDPModule | FullyShardedDataParallel):
            raise TypeError(
                f"attach got a {type(model).__name__} of which {name or 'itself'} is a {type(module).__name__}; give "
                "the DistributedDataParallel, or the root of fully_shard; FullyShardedDataParallel is not served"
            )
    cut = next((fqn for fqn, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)
    if cut is not None:
        raise TypeError(
            f"{cut} of this {type(model).__name__} is a DTensor, so no rank holds the model whole; give the root of "
            "fully_shard"
        )
    return True


def require_call(optimizer: object, sync: object) -> None:
    """Raise ``TypeError`` unless ``attach(model, optimizer, sync)`` was called with these in this order."""
    if isinstance(sync, Sync):
        return
    if callable(getattr(sync, "bind", None)) and not isinstance(sync, type):
        raise TypeError(
            f"sync is {sync!r}, which has bind() and not all of a sync; derive it from {Sync.__module__}.Sync"
        )
    if callable(getattr(optimizer, "bind", None)):
        swapped = " (the two are swapped)" if hasattr(sync, "param_groups") else ""
        raise TypeError(
            f"attach got the sync {optimizer} where the optimizer belongs{swapped}; call attach(model, optimizer, "
            "sync), with None for the optimizer of a DeepSpeed engine"
        )
    if sync is None:
        raise TypeError("attach got no sync; call attach(model, optimizer, sync) with, for example, every_step()")
    if callable(sync):
        name = getattr(sync, "__name__", type(sync).__name__)
        raise TypeError(f"sync is {name} itself; call it: attach(model, optimizer, {name}(...))")
    raise TypeError(
        f"sync is {sync!r}; give a sync such as every_step(...) or diloco(...). A compressor goes into one: "
        "every_step(compress=...)"
    )


def require_servable(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise the errors that `attach` documents for a model, and for an optimizer of another one."""
    for fqn, parameter in named_parameters(model):
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise ValueError(f"{fqn} holds no numbers yet (lazy, or on the meta device); fill the model before attach")
        if not parameter.requires_grad:
            continue
        if parameter.is_complex():
            raise TypeError(
                f"{fqn} is complex; keep real and imaginary parts as a real parameter (torch.view_as_real) and view it "
                "as complex in forward"
            )
        if steps_in_backward(parameter):
            raise ValueError(
                f"{fqn} is stepped within backward() (_apply_optimizer_in_backward), before anything could be "
                "exchanged or agreed on; give attach an optimizer that is stepped after it"
            )
    if hasattr(model, "zero_optimization_stage") or isinstance(model, FSDPModule):
        require_dense(sparse_modules(model))
    _require_own_parameters(model, optimizer)


def sparse_modules(model: nn.Module) -> list[str]:
    """Names of embeddings whose gradients are sparse tensors."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad
    ]


def require_dense(sparse: list[str]) -> None:
    """Raise ``ValueError`` for `sparse_modules` where gradients are exchanged."""
    if sparse:
        raise ValueError(
            f"{sparse[0]} has sparse gradients, which no exchange takes; build it with sparse=False, or train with a "
            "local update without warmup_steps, which exchanges no gradients where each rank is a replica"
        )


def _require_own_parameters(model: nn.Module, optimizer: Any) -> None:
    if optimizer is None:
        return
    of_model = {id(parameter) for parameter in model.parameters()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(id(parameter) not in of_model for parameter in stepped)
    if foreign == len(stepped):
        raise ValueError(
            f"{foreign} of the optimizer's {len(stepped)} parameters are not the model's; make the optimizer from "
            "model.parameters(), with FSDP2 after fully_shard"
        )
    if foreign:
        raise ValueError(
            f"{foreign} of the optimizer's {len(stepped)} parameters are not the model's; if it steps several models, "
            "put them into one, for example nn.ModuleDict({'generator': g, 'discriminator': d}), and attach to that: a "
            "local update takes it as it is. Otherwise make the optimizer from model.parameters(), with FSDP2 after "
            "fully_shard"
        )
