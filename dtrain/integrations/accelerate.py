"""A sync in a loop of Hugging Face Accelerate, with DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import functools
import os
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from dtrain import GradScaler, attach
from dtrain.integrations._frameworks import require, require_alike

require("accelerate")

from accelerate import Accelerator  # noqa: E402 - what require() says is better than an import error
from accelerate.optimizer import AcceleratedOptimizer, patch_optimizer_step  # noqa: E402

if TYPE_CHECKING:
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.evaluation import Evaluation
    from dtrain.comm.runtime.method import Sync

__all__ = ["Synced"]

FOLDER = "dtrain"
"""In a checkpoint: the files of the ranks."""


class Synced:
    """Puts ``method`` into a prepared model; the loop stays as it is. Call it on every rank, after ``prepare``.

    ``optimizer.step()`` is the sync's, also with accumulation and a loss scale. ``accelerator.save_state`` writes the
    outer parameters, on which all replicas agree, and each rank's own state beside them; ``load_state`` goes on from
    there bitwise. ``get_state_dict`` and ``save_model`` give the outer parameters.

    Args:
        accelerator: whose ``prepare`` made ``model`` and ``optimizer``.
        model: what ``prepare`` returned: DDP, an FSDP2 model, or a DeepSpeed engine.
        optimizer: what ``prepare`` returned, or a list of several; with DeepSpeed it is not used.
        method: made by `every_step`, `diloco`, ...
        begin_anew: what ``load_state`` does with a checkpoint that has no files of a sync: False refuses it, True
            begins a round from its weights.
        options: of `attach`: replicate_group, seed, members.

    >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # doctest: +SKIP
    >>> synced = Synced(accelerator, model, optimizer, diloco(every_steps=50))  # doctest: +SKIP
    ...                                                                      # the loop, unchanged
    >>> with synced.evaluation():  # doctest: +SKIP
    ...     evaluate(model)
    >>> synced.close()  # doctest: +SKIP

    Raises ``ImportError`` without accelerate, ``ValueError`` for a model that was not prepared, and what `attach` does.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        method: Sync,
        *,
        begin_anew: bool = False,
        **options: Any,
    ) -> None:
        if not getattr(model, "_is_accelerate_prepared", False):
            raise ValueError(
                f"this {type(model).__name__} is not one that accelerator.prepare() returned; call Synced after prepare"
            )
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self._method, self._begin_anew, self._options = method, begin_anew, options
        self._loading = Path()
        self._undo: list[Callable[[], None]] = []
        if any(inner.optimizer.state for inner in self._each()):
            warnings.warn(
                "the optimizer has a state already: if accelerator.load_state made it, call Synced before load_state, "
                "or what the ranks saved is not loaded and a new round begins",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        require_alike("dtrain.integrations.accelerate", begin_anew=begin_anew)
        self.sync: Attached = self._attach()
        for wrapped in self._each():
            self._tell_skipped(wrapped)
        self._wrap("save_state", self._save_state)
        self._wrap("load_state", self._load_state)
        self._wrap("get_state_dict", self._get_state_dict)
        self._undo.append(accelerator.register_load_state_pre_hook(self._remember).remove)

    def evaluation(self) -> Evaluation:
        """`Attached.evaluation`."""
        return self.sync.evaluation()

    def close(self) -> None:
        """Close the round, detach, and give the accelerator its methods back. Every rank must call it."""
        self.sync.close_round()
        self.sync.detach()
        for undo in self._undo:
            undo()

    def _attach(self) -> Attached:
        accelerator, optimizers = self._accelerator, self._each()
        given = None if hasattr(self._model, "zero_optimization_stage") else self._optimizer
        sync = attach(self._model, given, self._method, forward_steps=True, **self._options)
        scaler = accelerator.scaler
        if scaler is not None:
            kept = scaler.state_dict()
            scaler = GradScaler(sync, accelerator.device.type)
            scaler.load_state_dict(kept)
            accelerator.scaler = scaler
        for optimizer in optimizers:
            if scaler is not None:
                optimizer.scaler = scaler
                optimizer._optimizer_original_step_method = optimizer.optimizer.step
                optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)
        return sync

    def _each(self) -> list[AcceleratedOptimizer]:
        given: Sequence[Any] = self._optimizer if isinstance(self._optimizer, list | tuple) else [self._optimizer]
        return [optimizer for optimizer in given if isinstance(optimizer, AcceleratedOptimizer)]

    def _wrap(self, name: str, replacement: Callable[..., Any]) -> None:
        """Replace a method of the accelerator, until `close`."""
        original = getattr(self._accelerator, name)
        setattr(self._accelerator, name, functools.wraps(original)(functools.partial(replacement, original)))
        self._undo.append(lambda: delattr(self._accelerator, name))

    def _save_state(self, original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
        with self.sync.evaluation():
            folder = original(*args, **kwargs)
            self.sync.save(Path(folder) / FOLDER)
        return folder

    def _load_state(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        folder = self._loading / FOLDER
        if self._begin_anew and not folder.is_dir():
            self.sync.detach()
            self.sync = self._attach()
        else:
            self.sync.load(folder)

    def _get_state_dict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.sync.evaluation():
            state = original(*args, **kwargs)
            return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def _remember(self, models: list[nn.Module], folder: str) -> None:
        self._loading = Path(os.path.expanduser(folder))
        if not self._begin_anew and not (self._loading / FOLDER).is_dir():
            raise FileNotFoundError(
                f"{folder} has no folder {FOLDER}: it was saved without Synced. To begin a round from its weights: "
                "Synced(..., begin_anew=True)"
            )

    def _tell_skipped(self, optimizer: AcceleratedOptimizer) -> None:
        """Let Accelerate's scheduler wait, as after an overflow, where the sync has skipped a step on all ranks.

        Under local updates a replica skips alone; its scheduler goes on with those of the others.
        """
        original = type(optimizer).step

        def step(itself: Any, closure: Callable[[], float] | None = None) -> None:
            original(itself, closure)
            itself._is_overflow = self.sync.parameters_kind == "replicated" and self.sync.skipped_in_a_row > 0

        cast(Any, optimizer).step = types.MethodType(step, optimizer)
        self._undo.append(lambda: delattr(optimizer, "step"))
