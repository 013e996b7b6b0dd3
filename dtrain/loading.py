"""A trained model from its run folder, as a plain module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError
from dtrain.extras import OF_LAUNCHING, require
from dtrain.launchers import trust as trusted

if TYPE_CHECKING:
    from torch import nn

    from dtrain.train.config import Config
    from dtrain.train.initial_model import OfTheData

__all__ = ["config_of", "load", "of_the_data"]


def load(run: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """The model that a run has trained: built as its config.yaml says, with its weights, on the CPU, in eval mode.

        model = dtrain.load("runs/x")
        loss = model({"input": tokens[:, :-1], "target": tokens[:, 1:]})

    Args:
        run: a run folder that has ended, whose exported weights are taken, or one of its checkpoints,
            RUN/checkpoints/step-N. The weights are replica 0's: with a local update, the outer parameters.
        model: an object to put the weights into, for a run whose model was one (``dtrain.Trainer(model=...)``).

    It imports and calls what config.yaml names, as training does. The generators of random numbers are left as they
    were.

    Raises:
        ConfigError: no such run, one that another user can write to, or its model cannot be built here.
        CheckpointError: weights that are missing, damaged or of another model.
    """
    require(OF_LAUNCHING)
    from dtrain.train.checkpoint.weights import put_into, weights_of

    folder = _folder_of(Path(run))
    config = config_of(folder)
    built = _built(config, folder) if model is None else model
    put_into(built, weights_of(Path(run), dict(built.named_parameters())), str(run))
    return built.eval()


def config_of(run: Path) -> Config:
    """The configuration of a run; ``run`` is its folder, or one of its checkpoints. Raises ``ConfigError``."""
    from dtrain.train.config import load as load_config
    from dtrain.train.config.run_folder import CONFIG

    folder = _folder_of(run)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{run} is no run: it has no {CONFIG}; give a run folder, or RUN/checkpoints/step-N of one")
    try:
        for loaded in (folder, folder / CONFIG):
            trusted.require_own(loaded)
    except trusted.Untrusted as error:
        raise ConfigError(str(error)) from error
    return load_config(folder / CONFIG)


def of_the_data(config: Config, run: Path) -> OfTheData:
    """What the run recorded of its data; of a run without a record, as earlier versions leave, the data are asked."""
    from dtrain.train.config import instantiate
    from dtrain.train.initial_model import OfTheData

    recorded = OfTheData.of_run(_folder_of(run))
    return recorded or OfTheData.read(instantiate(config.data, "data", split="train"))


def _folder_of(run: Path) -> Path:
    return run.parent.parent if run.name.startswith("step-") and run.parent.name == "checkpoints" else run


def _built(config: Config, folder: Path) -> nn.Module:
    from dtrain.train import rng
    from dtrain.train.config import build_model

    before = rng.capture()
    try:
        rng.seed_everything(config.train.seed)  # frozen parameters that were drawn are in no checkpoint
        return build_model(config.model, of_the_data(config, folder).attributes())
    finally:
        rng.restore(before)
