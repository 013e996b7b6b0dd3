"""A sync in Lightning's Trainer: `SyncStrategy` with DDP, `ShardedSyncStrategy` with FSDP2.

The trainer steps, evaluates, saves and resumes as it always does. Its strategy does the rest:

    train starts       attach, after the trainer has wrapped the model and loaded a checkpoint; load this rank's file
    optimizer.step()   the sync's step, with automatic and manual optimization
    last batch         close the round, before the last validation and checkpoint
    validation         at the parameters of ``sync.evaluation()``
    checkpoint         the outer parameters; this rank's file beside it
    train ends         close the round; detach
"""

from __future__ import annotations

import shutil
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from dtrain import GradScaler, attach
from dtrain.comm.adapters.requirements import require_call
from dtrain.comm.transports.json_gather import gather_json
from dtrain.integrations._frameworks import require, require_alike

require("lightning")

from lightning.pytorch.callbacks import (  # noqa: E402 - what require() says is better than an import error
    Callback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy  # noqa: E402
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection  # noqa: E402
from lightning.pytorch.trainer.states import TrainerFn  # noqa: E402

if TYPE_CHECKING:
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.evaluation import Evaluation
    from dtrain.comm.runtime.method import Sync

__all__ = ["ShardedSyncStrategy", "SyncStrategy"]

SUFFIX = ".dtrain"
"""Of the folder beside a checkpoint that holds the files of the ranks."""

BUFFERS = {"broadcast_buffers", "forward_sync_buffers"}
"""Options of DDP, the first by its name before torch 2.13."""

STEPS = "dtrain_steps"
"""In a checkpoint: how many steps the sync had made."""

EXCHANGED, SKIPPED = "dtrain_sent_bytes", "dtrain_skipped_steps"
"""What is logged in every batch: of this rank, since training began."""


class _WithSync(ParallelStrategy):  # type: ignore[misc] # a class of lightning, which is not checked with ours
    """What a strategy does for a sync, whatever it wraps the model in.

    ``sync``: what `attach` returned, while ``fit()`` trains; None before and after it. ``report``: the sync's line for
    people, after ``fit()``.
    """

    def __init__(self, method: Sync, *, seed: int, begin_anew: bool, **options: Any) -> None:
        require_call(None, method)
        super().__init__(**options)
        self.sync: Attached | None = None
        self.report = ""
        self._method, self._seed, self._begin_anew = method, seed, begin_anew
        self._trainer: Any = None
        self._evaluation: Evaluation | None = None
        self._checkpoint: tuple[Path, int | None] | None = None
        self._after_batches = _AfterBatches(self)

    @abstractmethod
    def _attach(self) -> Attached: ...

    # ---- what the trainer calls --------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits:
            _require_servable(trainer)
        super().setup(trainer)
        if fits:
            self._trainer = trainer
            _send_no_signal(trainer)
            _tell_what_remains(trainer)
            trainer.callbacks.insert(0, self._after_batches)  # before those that save

    def on_train_start(self) -> None:
        """Attach; the checkpoint's model, optimizers and schedulers were loaded before."""
        super().on_train_start()
        checkpoint, self._checkpoint = self._checkpoint, None
        require_alike(
            "dtrain.integrations.lightning", strategy=type(self).__name__, resumes=checkpoint is not None,
            begin_anew=self._begin_anew, accumulate_grad_batches=self._trainer.accumulate_grad_batches,
        )  # fmt: skip
        self.sync = self._attach()
        self._evaluation = self.sync.evaluation()
        clear_alike(self._lightning_optimizers)
        scale_alike(self.precision_plugin, self.sync, self.root_device)
        if checkpoint is not None:
            path, steps = checkpoint
            if has_rank_files(path, self._begin_anew, f"{type(self).__name__}(method"):
                load_rank_files(self.sync, path, steps)

    def after_batch(self) -> None:
        """Close the round behind the last batch, and log."""
        if self.sync is None:
            return
        if _is_last_batch(self._trainer):
            self.sync.close_round()
        if not self._trainer.barebones:
            for name, value in ((EXCHANGED, self.sync.meter.sent_bytes), (SKIPPED, self.sync.skipped)):
                self.lightning_module.log(name, torch.tensor(value, dtype=torch.float64), on_step=True, on_epoch=False)

    def on_validation_start(self) -> None:
        if self._evaluation is not None:
            self._evaluation.enter()
        super().on_validation_start()

    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._evaluation is not None:
            self._evaluation.leave()

    def on_train_end(self) -> None:
        """Close the round of a run that was stopped before its last batch."""
        super().on_train_end()
        if self.sync is not None:
            self.sync.close_round()
            self.report = self.sync.report()

    def teardown(self) -> None:
        if self._evaluation is not None:
            self._evaluation.leave()
        sync, self.sync, self._evaluation, self._checkpoint = self.sync, None, None, None
        if sync is not None:
            sync.detach()
        if self._trainer is not None and self._after_batches in self._trainer.callbacks:
            self._trainer.callbacks.remove(self._after_batches)
        super().teardown()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.sync is None:
            return dict(super().lightning_module_state_dict())
        with self.sync.evaluation():
            return copied(super().lightning_module_state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.sync is None or "optimizer_states" not in checkpoint:  # for its weights only
            super().save_checkpoint(checkpoint, filepath, storage_options)
            self._remove_rank_files(filepath)
            return
        require_disk(filepath)
        self.barrier()  # a rank that is behind may still have to remove what had this name
        super().save_checkpoint({**checkpoint, STEPS: self.sync.steps}, filepath, storage_options)
        self.sync.save(beside(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._checkpoint = Path(checkpoint_path).resolve(), checkpoint.get(STEPS)
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        self._remove_rank_files(filepath)

    def _remove_rank_files(self, checkpoint: Any) -> None:
        if self.local_rank == 0 and "://" not in str(checkpoint):
            shutil.rmtree(beside(checkpoint), ignore_errors=True)


class SyncStrategy(_WithSync, DDPStrategy):  # type: ignore[misc]
    """``Trainer(strategy=SyncStrategy(method))``: as ``strategy="ddp"``, with ``method`` in place of its averaging.

    A checkpoint of the trainer holds the outer parameters; beside it, in ``CHECKPOINT.dtrain/``, each rank has a file
    with all that it needs to go on. `ShardedSyncStrategy` is the one for FSDP2.

    Args:
        method: made by `every_step`, `diloco`, ...
        seed: of `attach`.
        begin_anew: what ``fit(ckpt_path=...)`` does with a checkpoint that has no files of the ranks: False refuses it,
            True begins a round from its weights and optimizers.
        options: of ``lightning.pytorch.strategies.DDPStrategy``, and so of DDP. DDP broadcasts no buffers in forward,
            unless it is told to: that crosses the slow links in every batch.

    >>> trainer = Trainer(strategy=SyncStrategy(diloco(every_steps=50)))  # doctest: +SKIP
    >>> trainer.fit(module)  # doctest: +SKIP

    Raises ``TypeError`` for what is no method. ``fit()`` raises ``ValueError`` for callbacks that save when a rank
    fails alone, for files of the ranks that were not saved with the checkpoint, and on all ranks that use different
    integrations or settings; ``FileNotFoundError`` for a checkpoint without files of the ranks; and what `attach` and
    `Attached.load` do.
    """

    def __init__(self, method: Sync, *, seed: int = 0, begin_anew: bool = False, **options: Any) -> None:
        super().__init__(method, seed=seed, begin_anew=begin_anew, **options)
        self._broadcasts = bool(BUFFERS & options.keys())
        self._forward_redirection = _Redirection()

    def _attach(self) -> Attached:
        if not self._broadcasts:
            self.model.broadcast_buffers = False
        return attach(self.model, _one_or_all(self.optimizers), self._method, seed=self._seed, forward_steps=True)


class ShardedSyncStrategy(_WithSync, ModelParallelStrategy):  # type: ignore[misc]
    """``Trainer(strategy=ShardedSyncStrategy(method))``: `SyncStrategy` for a model that ``configure_model`` shards.

    As Lightning's ``ModelParallelStrategy``, without tensor parallelism. ``self.device_mesh`` of the LightningModule
    has the axes "replicate" and "shard":

    >>> def configure_model(self):  # doctest: +SKIP
    ...     for layer in self.model.layers:
    ...         fully_shard(layer, mesh=self.device_mesh)
    ...     fully_shard(self.model, mesh=self.device_mesh)

    Args:
        method, seed, begin_anew: as of `SyncStrategy`.
        replicas: how many; each is sharded over as many ranks. One per node, if None.
        options: of ``lightning.pytorch.strategies.ModelParallelStrategy``, but sizes.

    Raises what `SyncStrategy` does, and ``ValueError`` for ranks that cannot be divided among the replicas, and for a
    module with no root of ``fully_shard``, or several.
    """

    def __init__(
        self, method: Sync, replicas: int | None = None, *, seed: int = 0, begin_anew: bool = False, **options: Any
    ) -> None:
        if replicas is not None and replicas < 1:
            raise ValueError(f"replicas is {replicas}; give a number of at least 1, or None for one per node")
        super().__init__(method, seed=seed, begin_anew=begin_anew, **options)
        self._replicas = replicas

    def setup_environment(self) -> None:
        self._setup_distributed()
        world, replicas = self.world_size, self._replicas or self.num_nodes
        if world % replicas:
            raise ValueError(f"{world} ranks cannot be divided among {replicas} replicas; give replicas that divide it")
        self._device_mesh = init_device_mesh(
            self.root_device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard")
        )
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads a share of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Between the batches of a step gradients are not reduced, where they would be exchanged too."""
        if self.sync is None or self.sync.parameters_kind != "replicated":
            yield
            return
        root = _root(self.model)
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def _attach(self) -> Attached:
        return attach(
            _root(self.model), _one_or_all(self.optimizers), self._method, seed=self._seed, forward_steps=True,
            replicate_group=self.device_mesh.get_group("replicate"),
        )  # fmt: skip


class _Redirection(_DDPForwardRedirection):  # type: ignore[misc]
    """In manual optimization Lightning switches DDP's reduction off when ``training_step`` has ended, and on when DDP's
    forward has: here it becomes what it was, which under local updates is off.
    """

    def on_after_inner_forward(self, wrapper_module: Any, original_module: Any) -> None:
        self._reduces = wrapper_module.require_backward_grad_sync
        super().on_after_inner_forward(wrapper_module, original_module)

    def on_after_outer_forward(self, wrapper_module: Any, original_module: Any) -> None:
        super().on_after_outer_forward(wrapper_module, original_module)
        wrapper_module.require_backward_grad_sync = self._reduces


class _AfterBatches(Callback):  # type: ignore[misc]
    """Strategies are not told when a batch has ended."""

    def __init__(self, strategy: _WithSync) -> None:
        self._strategy = strategy

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._strategy.after_batch()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def beside(checkpoint: Any) -> Path:
    """The folder of the ranks' files. A link to a checkpoint (``save_last="link"``) has none: resolve it to load."""
    return Path(f"{checkpoint}{SUFFIX}")


def require_disk(checkpoint: Any) -> None:
    """Raise ``ValueError`` for a URL: the ranks' files are written by this machine's file system."""
    if "://" in str(checkpoint):
        raise ValueError(
            f"{checkpoint} is no path of a file system, and the files of the ranks need one; save to a folder on a "
            "disk, and copy it from there"
        )


def has_rank_files(checkpoint: Any, begin_anew: bool, call: str) -> bool:
    """Whether any rank sees files of the ranks beside it. Every rank must call it.

    Raises ``FileNotFoundError`` on all ranks if none does, unless ``begin_anew``.
    """
    if any(gather_json(beside(checkpoint).is_dir())):
        return True
    if not begin_anew:
        raise FileNotFoundError(
            f"{checkpoint} has no folder {beside(checkpoint).name} beside it: it was saved without dtrain, without its "
            f"optimizers, or after training. To begin a round from its weights: {call}, begin_anew=True)"
        )
    return False


def load_rank_files(sync: Attached, checkpoint: Any, steps: int | None) -> None:
    """``steps``: of the sync, as `STEPS` of the checkpoint has them. Raises what `Attached.load` does, and
    ``ValueError`` for files that were not saved with the checkpoint.
    """
    sync.load(beside(checkpoint))
    if steps != sync.steps:
        raise ValueError(
            f"{checkpoint} is of step {steps} of a sync, and the files of the ranks in {beside(checkpoint)} of step "
            f"{sync.steps}: they were not saved together; resume from another checkpoint"
        )


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model that will soon hold other parameters."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


# ---- what the trainer is asked, and told -----------------------------------------------------------------------------


def clear_alike(wrapped: Sequence[Any]) -> None:
    """Let ``zero_grad`` of Lightning's wrappers be that of their optimizers. The wrappers' own, which they have from
    the optimizer's class, would clear what is used when the last of several optimizers is stepped.
    """
    for optimizer in wrapped:
        optimizer.zero_grad = optimizer.optimizer.zero_grad


def scale_alike(precision: Any, sync: Attached, device: torch.device) -> None:
    """Give ``precision`` a loss scale that all ranks change alike, with the state of its own."""
    if getattr(precision, "scaler", None) is not None:
        scaler = GradScaler(sync, device.type)
        scaler.load_state_dict(precision.scaler.state_dict())
        precision.scaler = scaler


def _require_servable(trainer: Any) -> None:
    for callback in trainer.callbacks:
        alone = isinstance(callback, ModelCheckpoint) and callback.save_on_exception
        if alone or isinstance(callback, OnExceptionCheckpoint):
            raise ValueError(
                f"{type(callback).__name__} saves when a rank fails, each at a step of its own, and checkpoints of a "
                "sync are of one step; leave it out (save_on_exception=False), and save every_n_train_steps"
            )


def _send_no_signal(trainer: Any) -> None:
    """Lightning broadcasts in every batch whether rank 0 was told to stop. Each rank heeds its own signal instead:
    launchers send it to all. A rank does not save where a signal finds it, within a step that no other is in.
    """
    signals = trainer._signal_connector

    def noted(signum: Any, _: Any) -> None:
        if not signals.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        signals.received_sigterm = True

    def not_saved(*_: Any) -> None:
        warnings.warn(
            "a signal asked Lightning to save and to requeue this job, which a sync cannot do at a step of this rank's "
            "own: it trains on. Save every_n_train_steps, and requeue the job with sbatch --requeue",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip

    signals._sigterm_notifier_fn = noted
    signals._slurm_sigusr_handler_fn = not_saved
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def _tell_what_remains(trainer: Any) -> None:
    remaining = []
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            remaining.append("the Timer (max_time) broadcasts whether to stop; use max_steps or max_epochs")
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            remaining.append("train_time_interval broadcasts whether to save; use every_n_train_steps")
    for what in remaining:
        warnings.warn(f"over the slow links in every batch: {what}", RuntimeWarning, stacklevel=3)


def _is_last_batch(trainer: Any) -> bool:
    """Whether ``fit`` trains no further than the batch that has ended."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    progress, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.max_epochs
    ended = progress.is_last_batch or progress.current.ready == trainer.num_training_batches
    return bool(ended and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1)


def _one_or_all(optimizers: list[Any]) -> Any:
    return optimizers[0] if len(optimizers) == 1 else optimizers


def _root(module: nn.Module) -> Any:
    """The module that ``fully_shard`` was given last. Raises ``ValueError`` unless there is one."""
    sharded = [name for name, inner in module.named_modules() if isinstance(inner, FSDPModule)]
    roots = [name for name in sharded if not any(_within(name, other) for other in sharded if other != name)]
    if len(roots) != 1:
        raise ValueError(
            f"configure_model left {len(roots)} roots of fully_shard ({', '.join(roots) or 'none'}); give fully_shard "
            "the layers, then the whole model, with mesh=self.device_mesh"
        )
    return module.get_submodule(roots[0])


def _within(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")
