"""Wrappers that trainers put around a model or an optimizer: `attach` removes them, also from names.

A wrapper does not change the model, so patterns, seeds, fragments and states of a sync must not depend on it:
``torch.compile`` puts ``_orig_mod`` into names, activation checkpointing ``_checkpoint_wrapped_module``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from dtrain.comm.adapters.communicating_optimizers import require_silent
from dtrain.comm.inner_optimizers.chained import chain

IN_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")
"""Submodules that torch adds to a name: those of ``torch.compile`` and ``checkpoint_wrapper``."""

AROUND_MODELS = {"OptimizedModule": "_orig_mod", "_FabricModule": "_forward_module"}
"""Classes that forward calls to a model, and the attribute that holds it: torch.compile's, Fabric's."""

AROUND_OPTIMIZERS = {
    "AcceleratedOptimizer": "optimizer",
    "_FabricOptimizer": "_optimizer",
    "LightningOptimizer": "_optimizer",
}
"""The same for optimizers: Accelerate's, Fabric's and Lightning's."""

IN_BACKWARD = ("OptimizersInBackwardContainer",)
"""Containers whose optimizers are stepped within the backward pass: torchtitan's."""


def plain_name(name: str) -> str:
    """The name that a parameter, a buffer or a module has without wrappers.

    >>> plain_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    return ".".join(component for component in name.split(".") if component not in IN_NAMES)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``model.named_parameters()``, by `plain_name`."""
    return ((plain_name(name), parameter) for name, parameter in model.named_parameters())


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model or its DDP, ``fully_shard`` or DeepSpeed wrapper, without what trainers put around it."""
    while isinstance(model, nn.Module) and (inner := _within(model, AROUND_MODELS)) is not None:
        model = inner
    return model


def unwrapped_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer, without what trainers put around it; several `chain`.

    Raises ``TypeError`` for what is not one, and for an unknown wrapper; ``ValueError`` for one that communicates, for
    several that step the same parameter, and for a container that steps within ``backward()``.
    """
    if (several := several_in(optimizer)) is not None:
        return chain(*(cast(torch.optim.Optimizer, unwrapped_optimizer(member)) for member in several))
    while (inner := _within(optimizer, AROUND_OPTIMIZERS)) is not None:
        optimizer = inner
    if optimizer is None:
        return None
    if isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer):
        return optimizer
    if isinstance(optimizer, dict):
        raise TypeError(
            f"attach got a dict of {len(optimizer)} optimizers; give a list of them: list(optimizers.values())"
        )
    if isinstance(optimizer, torch.nn.Module):
        raise TypeError(
            f"attach got a {type(optimizer).__name__}, which is a model, where the optimizer belongs; call "
            "attach(model, optimizer, sync)"
        )
    require_silent(optimizer)
    inner = next((name for name, value in _attributes(optimizer) if isinstance(value, torch.optim.Optimizer)), None)
    hint = f"; if it only wraps the optimizer in .{inner}, give that one" if inner else ""
    raise TypeError(
        f"attach got a {type(optimizer).__name__} for an optimizer, which is no torch.optim.Optimizer that was "
        f"initialized (its step has no hooks){hint}"
    )


def several_in(given: Any) -> Sequence[Any] | None:
    """The optimizers that a trainer steps one by one: of a list, or of a container such as torchtitan's.

    A container is an optimizer with a list of others in ``optimizers``, which its own ``step()`` steps. None for
    anything else.
    """
    if isinstance(given, list | tuple):
        return given
    if not isinstance(given, torch.optim.Optimizer):
        return None
    several = getattr(given, "optimizers", None)
    if not isinstance(several, list | tuple) or not all(isinstance(one, torch.optim.Optimizer) for one in several):
        return None
    if any(owner.__name__ in IN_BACKWARD for owner in type(given).__mro__):
        raise ValueError(
            f"{type(given).__name__} steps each parameter within backward(), before anything could be exchanged or "
            "agreed on; give attach optimizers that are stepped after it"
        )
    return several


def _within(wrapper: Any, attributes: dict[str, str]) -> Any:
    """What a wrapper holds in the attribute of its class, or of a base class of it; None for anything else."""
    for owner in type(wrapper).__mro__:
        if owner.__name__ in attributes:
            return getattr(wrapper, attributes[owner.__name__], None)
    return None


def _attributes(wrapper: Any) -> list[tuple[str, Any]]:
    return list(vars(wrapper).items()) if hasattr(wrapper, "__dict__") else []
