"""A sync in a loop of Lightning Fabric, with DDP or FSDP2."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain import attach
from dtrain.comm.adapters.wrappers import unwrapped_model, unwrapped_optimizer
from dtrain.integrations._frameworks import require, require_alike

require("lightning")

from lightning.fabric import Fabric  # noqa: E402 - what require() says is better than an import error
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer  # noqa: E402

from dtrain.integrations.lightning import (  # noqa: E402
    STEPS,
    beside,
    clear_alike,
    has_rank_files,
    load_rank_files,
    require_disk,
    scale_alike,
)

if TYPE_CHECKING:
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.evaluation import Evaluation
    from dtrain.comm.runtime.method import Sync

__all__ = ["Synced"]


class Synced:
    """Puts ``method`` into a model that Fabric has set up; the loop stays as it is. Call it on every rank.

    ``optimizer.step()`` is the sync's, also with accumulation (``fabric.no_backward_sync``), clipping and a loss scale.
    ``fabric.save`` of a state with this model writes the outer parameters, on which all replicas agree, and each rank's
    own state into ``PATH.dtrain/``; ``fabric.load`` goes on from there bitwise.

    Args:
        fabric: whose ``setup`` made ``model`` and ``optimizer``.
        model: what ``setup`` returned; with FSDP2 what ``setup_module`` did.
        optimizer: what ``setup`` returned, or a list of several.
        method: made by `every_step`, `diloco`, ...
        begin_anew: what ``fabric.load`` does with a checkpoint that has no files of the ranks: False refuses it, True
            begins a round from its weights and optimizers.
        options: of `attach`: replicate_group, seed.

    >>> model, optimizer = fabric.setup(model, optimizer)  # doctest: +SKIP
    >>> synced = Synced(fabric, model, optimizer, diloco(every_steps=50))  # doctest: +SKIP
    ...                                                                    # the loop, unchanged
    >>> with synced.evaluation():  # doctest: +SKIP
    ...     evaluate(model)
    >>> synced.close()  # doctest: +SKIP

    Raises ``ImportError`` without lightning; ``ValueError`` for a model or an optimizer that Fabric has not set up, and
    on all ranks that use different integrations or settings; and what `attach` does. ``fabric.load`` raises what
    `Attached.load` does, ``FileNotFoundError`` for a checkpoint without files of the ranks, and ``ValueError`` for
    files that were not saved with it.
    """

    def __init__(
        self, fabric: Fabric, model: Any, optimizer: Any, method: Sync, *, begin_anew: bool = False, **options: Any
    ) -> None:
        several: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        _require_set_up(model, several)
        if any(inner.optimizer.state for inner in several):
            warnings.warn(
                "the optimizer has a state already: if fabric.load made it, call Synced before fabric.load, or what "
                "the ranks saved is not loaded and a new round begins",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        self._fabric, self._model, self._optimizer, self._method = fabric, model, optimizer, method
        self._several, self._begin_anew, self._options = several, begin_anew, options
        require_alike("dtrain.integrations.fabric", begin_anew=begin_anew)
        self.sync: Attached = self._attach()
        self._wrap("save", self._save)
        self._wrap("load", self._load)

    def evaluation(self) -> Evaluation:
        """`Attached.evaluation`."""
        return self.sync.evaluation()

    def close(self) -> None:
        """Close the round, detach, and give Fabric its methods back. Every rank must call it."""
        self.sync.close_round()
        self.sync.detach()
        for name in ("save", "load"):
            delattr(self._fabric, name)
        for optimizer in self._several:
            del optimizer.zero_grad

    def _attach(self) -> Attached:
        sync = attach(self._model, self._optimizer, self._method, forward_steps=True, **self._options)
        clear_alike(self._several)
        scale_alike(self._fabric.strategy.precision, sync, self._fabric.device)
        return sync

    def _wrap(self, name: str, replacement: Callable[..., Any]) -> None:
        """Replace a method of Fabric, until `close`."""
        original = getattr(self._fabric, name)
        setattr(self._fabric, name, functools.wraps(original)(functools.partial(replacement, original)))

    def _save(self, original: Callable[..., None], path: Any, state: Mapping[str, Any], *args: Any, **kw: Any) -> None:
        if not self._holds_model(state):
            original(path, state, *args, **kw)
            return
        require_disk(path)
        with self.sync.evaluation():
            original(path, {**state, STEPS: self.sync.steps}, *args, **kw)
        self.sync.save(beside(path))

    def _load(self, original: Callable[..., Any], path: Any, state: Any = None, *args: Any, **kw: Any) -> Any:
        if not self._holds_model(state):
            return original(path, state, *args, **kw)
        path = Path(path).resolve()
        resumes = has_rank_files(path, self._begin_anew, "Synced(..")
        remainder = original(path, state, *args, **kw)
        steps = remainder.pop(STEPS, None)
        if resumes:
            load_rank_files(self.sync, path, steps)
        else:
            self.sync.detach()
            self.sync = self._attach()
        return remainder

    def _holds_model(self, state: Any) -> bool:
        mine = unwrapped_model(self._model)
        values = state.values() if isinstance(state, Mapping) else [state]
        return any(isinstance(value, _FabricModule) and unwrapped_model(value) is mine for value in values)


def _require_set_up(model: Any, optimizers: list[Any]) -> None:
    if not isinstance(model, _FabricModule):
        raise ValueError(f"this {type(model).__name__} was not set up; call fabric.setup(model, optimizer) before")
    for optimizer in optimizers:
        if not isinstance(optimizer, _FabricOptimizer):
            unwrapped_optimizer(optimizer)
            raise ValueError(
                f"this {type(optimizer).__name__} was not set up; call fabric.setup(model, optimizer) before, or "
                "fabric.setup_optimizers(optimizer)"
            )
