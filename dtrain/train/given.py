"""A model and data sets that a program made itself, in place of settings: what `dtrain.Trainer` trains.

In the configuration they are ``{_target_: dtrain.train.given.model, of: mine.Net}``: it says what the object was, and
within `given` calling it returns the object. Everywhere else it is an error that says how to go on.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.train.data.batches import fetch
from dtrain.train.models.hf import CausalLM

__all__ = ["Examples", "data", "described", "given", "model", "name_of", "returning_loss"]

_objects: dict[str, object] = {}


@runtime_checkable
class Examples(Protocol):
    """What a data set needs: ``len()``, and ``[i]``, a dict of tensors of the same shapes in every example.

    It may have ``tokens_per_example`` and ``describe()`` as well, and ``vocab_size``, as docs/models.md says.
    """

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]:
        """Example ``index``."""


def model(*, of: str) -> nn.Module:
    """A copy of the model that was handed over: training shards it, and moves it to its device."""
    if "model" not in _objects:
        raise ConfigError(
            f"the model of this run was an object ({of}) in a program: hand one over again, by "
            "dtrain.Trainer(model=...), or dtrain.load(run, model=...)"
        )
    handed: nn.Module = copy.deepcopy(_objects["model"])  # type: ignore[assignment]
    return handed


def data(*, of: str, split: str = "train") -> object:
    """The data set that was handed over for this split."""
    if split not in _objects:
        raise ConfigError(
            f"the data of this run were an object ({of}) in a program: hand them over again, by "
            "dtrain.Trainer(data=..., validation=...), or name other data: data=text data.path=FOLDER"
        )
    return _objects[split]


@contextlib.contextmanager
def given(objects: Mapping[str, object]) -> Iterator[None]:
    """Within the block, `model` and `data` return these: "model", "train", "validation"."""
    before = dict(_objects)
    _objects.clear()
    _objects.update(objects)
    try:
        yield
    finally:
        _objects.clear()
        _objects.update(before)


def name_of(handed: object) -> str:
    """What the configuration says of an object: the path of its class."""
    return f"{type(handed).__module__}.{type(handed).__qualname__}"


def returning_loss(handed: nn.Module) -> nn.Module:
    """A model under dtrain's contract: one of transformers, or of peft around one, in a `CausalLM`; any other as it is.

    Raises:
        ConfigError: it is wrapped in DDP, FSDP or the like, which the engine does itself.
    """
    inner = getattr(handed, "module", None)
    if isinstance(inner, nn.Module) and type(handed).__module__.startswith(("torch.nn.parallel", "deepspeed")):
        raise ConfigError(f"model is a {type(handed).__name__}; hand over the module in it: engine=ddp wraps it itself")
    of_transformers = {"PreTrainedModel", "PeftModel"} & {owner.__name__ for owner in type(handed).__mro__}
    return CausalLM(handed) if of_transformers else handed


class _Described:
    """A data set with the rest of dtrain's contract: tokens of an example, and what identifies the data."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        first = examples[0]
        rows = [tensor.shape[0] for tensor in first.values() if tensor.dim() == 1 and not tensor.is_floating_point()]
        self.tokens_per_example = int(getattr(examples, "tokens_per_example", max(rows, default=1)))

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # copy and pickle ask before there is anything to delegate to
            raise AttributeError(name)
        return getattr(self._examples, name)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]:
        return self._examples[index]

    def describe(self) -> dict[str, object]:
        """As the data set says it; else how many examples there are, and a digest of the first, middle and last."""
        own = getattr(self._examples, "describe", None)
        if callable(own):
            return dict(own())
        sha, count = hashlib.sha256(), len(self)
        some: Any = self
        for name, tensor in sorted(fetch(some, sorted({0, count // 2, count - 1})).items()):
            sha.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            sha.update(tensor.contiguous().cpu().numpy().tobytes())
        return {"type": name_of(self._examples), "count": count, "digest": sha.hexdigest()}


def described(examples: object, what: str) -> object:
    """``examples`` under dtrain's contract of data sets.

    Raises:
        ConfigError: it has no ``len()`` or ``[i]``, holds nothing, or its examples are no dicts of tensors.
    """
    if not isinstance(examples, Examples):
        raise ConfigError(
            f"{what} is a {type(examples).__name__}; a data set has len() and [i] -> dict[str, Tensor]: a list of "
            "dicts of tensors, for example (not a DataLoader, as dtrain makes the batches)"
        )
    if not len(examples):
        raise ConfigError(f"{what} has no example; give it more data")
    first: object = examples[0]
    if not isinstance(first, Mapping) or not all(isinstance(value, Tensor) for value in first.values()):
        raise ConfigError(f"{what}[0] is a {type(first).__name__}; it must be a dict of tensors by name")
    return _Described(examples)
