"""The model that a run begins with, and RUN/model.json: what it was built from beside its settings.

model.json      vocab_size, max_length, tokenizer: of the data, so that the model can be built where they are not
                files: what identifies the weights that stay frozen, of which no checkpoint has a copy
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from dtrain.errors import CheckpointError, ConfigError, ModelError, ResumeError
from dtrain.launchers import strict_json
from dtrain.train.checkpoint.folders import write_text_durably
from dtrain.train.checkpoint.weights import put_into, weights_of
from dtrain.train.config import Config
from dtrain.train.config.model_factory import build_model

__all__ = ["RECORD", "OfTheData", "initial_model"]

RECORD = "model.json"


@dataclass(frozen=True)
class OfTheData:
    """What a model and its tokens need to know of the data. ``tokenizer``: "bytes" or the path of a tokenizer.json, as
    ``name``, and the ``sha256`` of that; empty where the data set has none.
    """

    vocab_size: int | None
    tokens_per_example: int
    tokenizer: dict[str, object]

    @classmethod
    def read(cls, data: object) -> OfTheData:
        """Of a data set."""
        known: Any = data
        vocab_size, tokenizer = getattr(known, "vocab_size", None), getattr(known, "tokenizer", None)
        return cls(
            vocab_size if isinstance(vocab_size, int) else None,
            int(known.tokens_per_example),
            dict(tokenizer) if isinstance(tokenizer, Mapping) else {},  # an object of a user's own is none of ours
        )

    @classmethod
    def of_run(cls, folder: Path) -> OfTheData | None:
        """As the run in ``folder`` recorded it; None for a run without a record. Raises ``CheckpointError``."""
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            entries = strict_json.read(path)
            vocab_size = None if entries["vocab_size"] is None else strict_json.integer(entries, "vocab_size")
            tokenizer = strict_json.object_of(entries, "tokenizer")
            return cls(vocab_size, strict_json.integer(entries, "tokens_per_example"), tokenizer)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it, and the data are asked instead") from error

    def attributes(self) -> object:
        """An object from which `build_model` fills in the keywords of a model."""
        known = asdict(self)
        if known["vocab_size"] is None:
            del known["vocab_size"]
        return type("Data", (), known)()


def initial_model(config: Config, data: object, *, rank: int) -> nn.Module:
    """The model of ``config`` for these data, with the weights that the run begins with. Every rank builds the same.

    Raises ``ModelError`` where nothing can be trained, ``ConfigError`` for weights to begin with that do not fit,
    ``ResumeError`` where the files of frozen weights have changed since the run was launched.
    """
    model = build_model(config.model, data)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"model: {config.model['_target_']} has no parameter that requires a gradient")
    if config.run.weights:
        _begin_with(model, Path(config.run.weights))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of each machine looks
        _record(Path(config.run.dir), model, data, writes=rank == 0)
    return model


def _begin_with(model: nn.Module, path: Path) -> None:
    """A file that a run begins with is as wrong at the next start: ``ConfigError``, which nobody restarts."""
    try:
        put_into(model, weights_of(path, dict(model.named_parameters())), f"run.weights={path}")
    except CheckpointError as error:
        raise ConfigError(f"{error}; give a safetensors file, a checkpoint or a run of this model") from error


def _record(folder: Path, model: nn.Module, data: object, *, writes: bool) -> None:
    """Write model.json, or compare the files of frozen weights with those that it names."""
    describe = getattr(model, "describe", None)
    files: dict[str, object] = dict(describe()) if callable(describe) else {}
    path = folder / RECORD
    try:
        stored = cast("dict[str, object]", strict_json.read(path).get("files", {}))
    except (OSError, ValueError):
        stored = {}
    if stored.get("sha256") != files.get("sha256") and stored:
        raise ResumeError(
            f"the frozen weights have changed since the run was launched: their digest was {stored.get('sha256')} and "
            f"is {files.get('sha256')}; bring the same files back ({stored.get('path')})"
        )
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        text = strict_json.dumps({**asdict(OfTheData.read(data)), "files": files}, indent=2)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text_durably(path, text)
