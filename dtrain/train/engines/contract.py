"""The contract of a model, ``model(batch) -> scalar loss tensor``, checked wherever an engine calls one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dtrain.errors import ModelError

__all__ = ["loss_of", "unused"]

CONTRACT = "model(batch) -> Tensor: the scalar mean loss"
WRAPPED = "for example self.model(input_ids=batch[...], labels=batch[...]).loss"


def loss_of(model: Callable[[Mapping[str, Tensor]], object], batch: Mapping[str, Tensor]) -> Tensor:
    """``model(batch)``, which must be a scalar floating-point tensor with a gradient (where gradients are enabled).

    What the model raises passes through, with a note that describes the batch: most of these errors are an unexpected
    key or shape.

    Raises:
        ModelError: it returned something else.
    """
    try:
        loss = model(batch)
    except Exception as error:
        error.add_note(f"the batch has {described(batch)}{_how_to_wrap(model)}")
        raise
    wrong = _wrong(loss)
    if wrong:
        raise ModelError(f"the model must be {CONTRACT}, but it returned {wrong}; the batch has {described(batch)}")
    assert isinstance(loss, Tensor)
    return loss


def _how_to_wrap(model: object) -> str:
    """For models of transformers, which take their inputs one by one; empty for others."""
    classes = type(getattr(model, "module", model)).__mro__
    if not any(owner.__name__ == "PreTrainedModel" for owner in classes):
        return ""
    return (
        "; a model is called with the batch as one mapping, and this one of transformers takes its inputs one by one: "
        f"wrap it in a module whose forward(self, batch) returns its loss, {WRAPPED}"
    )


def unused(names: Sequence[str]) -> ModelError:
    """The error for parameters without a gradient, for which the engine would wait."""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ModelError(
        f"{listed or 'some parameters'} had no part in the loss of this step, and the other ranks wait for a gradient: "
        "set engine.unused_parameters=true, and it counts as zero; or freeze what is never trained by "
        "requires_grad_(False)"
    )


def _wrong(loss: object) -> str:
    """What came back instead of a loss, and what to do about it; empty for a loss."""
    if isinstance(loss, Mapping) and "loss" in loss:
        return (
            f"{described(loss)}: return the loss alone, of a model that is not yours from a module around it, {WRAPPED}"
        )
    if not isinstance(loss, Tensor):
        return f"{described(loss)}: return the loss alone"
    if loss.dim():
        return f"{described(loss)}: take its mean(), or squeeze() it"
    if not loss.is_floating_point():
        return f"{described(loss)}: a loss is a floating-point number"
    if torch.is_grad_enabled() and not loss.requires_grad:
        return f"{described(loss)} without a gradient: no parameter has a part in it (detach(), item() or no_grad()?)"
    return ""


def described(value: object) -> str:
    """Type and shape of a value, also of the elements of a tuple, list or mapping.

    >>> described({"input": torch.zeros(2, 3), "weight": torch.tensor(1.0)})
    'input: Tensor[2, 3] of float32, weight: scalar Tensor of float32'
    """
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"Tensor{list(value.shape)} of {kind}" if value.dim() else f"scalar Tensor of {kind}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {described(inner)}" for name, inner in value.items()) or "nothing"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} ({', '.join(map(described, value))})"
    return f"a {type(value).__name__}"
