"""LoRA (Hu et al. 2021): beside a frozen matrix W ``[out, in]`` a trained update (alpha / rank) B A, B ``[out, rank]``,
A ``[rank, in]``.

B begins at zero, so that the model begins as its base. Only the adapters A and B are trained: they alone are exchanged
between replicas, stored in checkpoints, and exported. `peft` makes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError
from dtrain.extras import require
from dtrain.nearest import closest, hint

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ALL_LINEAR", "LoRA"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Settings of the adapters. ``rank`` 0: none, all of the model is trained.

    ``alpha``: None for twice the rank. ``targets``: the last parts of the names of the layers that get adapters, such
    as ``q_proj``; ``all-linear`` for all but the head; without any, those that peft chooses for the architecture.
    ``dropout``: of the adapters' inputs. Raises ``ValueError`` for values out of range.
    """

    rank: int = 0
    alpha: float | None = None
    targets: Sequence[str] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; give 1 or more, or 0 to train all of the model")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(
                f"lora.alpha is {self.alpha}; it scales the adapters: more than 0, twice the rank is usual"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it is a fraction from 0 to less than 1")
        if isinstance(self.targets, str):
            raise ValueError(f"lora.targets is the text {self.targets!r}; give a list: [{self.targets!r}]")

    def around(self, model: nn.Module) -> nn.Module:
        """``model`` of transformers with adapters, everything else frozen: a ``peft.PeftModel``, or itself for rank 0.

        Raises:
            ConfigError: a target that no layer has, no target known for this architecture, or peft is missing.
        """
        if not self.rank:
            if self.targets:
                raise ConfigError(
                    f"model.lora.targets={list(self.targets)}, but model.lora.rank=0 trains all of the model; set "
                    "model.lora.rank=8, for example"
                )
            return model
        require(["peft"])
        self._check_targets(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names of transformers that peft still uses
            from peft import LoraConfig, get_peft_model

            everything = list(self.targets) == [ALL_LINEAR]
            settings = LoraConfig(
                r=self.rank,
                lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
                target_modules=(ALL_LINEAR if everything else list(self.targets)) if self.targets else None,
                lora_dropout=self.dropout,
                task_type="CAUSAL_LM",
            )
            try:
                adapted: nn.Module = get_peft_model(model, settings)
            except ValueError as error:
                listed = ", ".join(_layers(model))
                raise ConfigError(f"model.lora: {error}; model.lora.targets=[...] names some of {listed}") from error
        return adapted

    def _check_targets(self, model: nn.Module) -> None:
        if list(self.targets) == [ALL_LINEAR]:
            return
        names = [name for name, _ in model.named_modules()]
        for target in self.targets:
            if not any(name == target or name.endswith("." + target) for name in names):
                layers = _layers(model)
                raise ConfigError(
                    f"model.lora.targets: no layer of {type(model).__name__} is called {target}"
                    f"{hint(closest(target, layers))} (there are {', '.join(layers)}; or {ALL_LINEAR} alone)"
                )


def _layers(model: nn.Module) -> list[str]:
    """The last parts of the names of layers that multiply by a matrix, in the order of the model."""
    matrices = ("Linear", "Conv1D", "Embedding")
    named = (name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ in matrices)
    return list(dict.fromkeys(named))
