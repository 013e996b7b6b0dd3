"""The model of a run: made from its settings, and from what only the data set knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError
from dtrain.train.config.targets import instantiate, keywords_of, locate

if TYPE_CHECKING:
    from torch import nn

FROM_THE_DATA = {"vocab_size": "vocab_size", "max_length": "tokens_per_example"}
"""Keyword of a model -> attribute of the data set that it is filled from, where the settings do not give it."""


def build_model(settings: Mapping[str, object], data: object) -> nn.Module:
    """Make the model that ``settings`` describe for the data set ``data``, on torch's default device.

    A keyword of `FROM_THE_DATA` that the target takes by name and the settings leave out comes from the data set.

    Raises:
        ConfigError: the target does not take these values, or makes no ``torch.nn.Module``.
    """
    from torch import nn

    named, _ = keywords_of(locate(settings.get("_target_"), "model"))
    extra = {
        keyword: getattr(data, attribute)
        for keyword, attribute in FROM_THE_DATA.items()
        if keyword in named and keyword not in settings and hasattr(data, attribute)
    }
    model = instantiate(settings, "model", **extra)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {settings['_target_']} makes a {type(model).__name__}, no torch.nn.Module")
    return model
