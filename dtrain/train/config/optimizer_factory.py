"""The inner optimizer of a run, made from its settings and the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError
from dtrain.train.config.targets import instantiate, keywords_of, locate

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

WHERE = "optim.inner"


def takes_model(settings: Mapping[str, object]) -> bool:
    """Whether the target wants the model itself, as ``dtrain.inner.muon``, and not only its parameters."""
    named, _ = keywords_of(locate(settings.get("_target_"), WHERE))
    return "model" in named and "params" not in named


def inner_optimizer(settings: Mapping[str, object], model: nn.Module) -> Optimizer:
    """The optimizer that ``settings`` describe, over ``model``, as it is trained.

    Raises:
        ConfigError: the target does not take these values or this model, or makes no ``torch.optim.Optimizer``.
    """
    from torch.optim import Optimizer

    if takes_model(settings):
        optimizer = instantiate(settings, WHERE, model=model)
    else:
        optimizer = instantiate(settings, WHERE, params=model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"{WHERE}: {settings['_target_']} makes a {type(optimizer).__name__}, no torch.optim.Optimizer"
        )
    return optimizer
