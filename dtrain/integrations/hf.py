"""A sync in ``transformers.Trainer``, and in trainers built on it (TRL's SFTTrainer): `sync_with`.

The trainer steps, evaluates, saves and resumes as it always does; what it does not know of is put around these calls:

    train begins       attach, after the trainer has wrapped the model and loaded a checkpoint; load this rank's file
    optimizer.step()   the sync's step; the scheduler waits where all ranks have skipped one
    last step          close the round, before the last evaluation and checkpoint
    evaluate, predict, save_model     at the parameters of ``sync.evaluation()``
    checkpoint         this rank's file beside the trainer's
    train ends         close the round, detach
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from dtrain import GradScaler, attach
from dtrain.comm.adapters.rank_files import SUFFIX
from dtrain.comm.adapters.requirements import require_call
from dtrain.comm.adapters.wrappers import unwrapped_model, unwrapped_optimizer
from dtrain.comm.runtime.saved import place_name
from dtrain.comm.transports.json_gather import gather_json
from dtrain.integrations._frameworks import require, require_alike

require("transformers")
require("accelerate")

from accelerate.optimizer import patch_optimizer_step  # noqa: E402 - what require() says is better than an import error
from transformers import Trainer, TrainerCallback  # noqa: E402

if TYPE_CHECKING:
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.method import Sync

__all__ = ["SyncCallback", "sync_with"]

FOLDER = "dtrain"
"""In a checkpoint: the files of the ranks."""

EXCHANGED, SKIPPED = "dtrain_sent_bytes", "dtrain_skipped_steps"
"""What is added to each entry of the trainer's log that has a training loss: of this rank, since ``train()`` began."""


def sync_with(
    trainer: Trainer,
    method: Sync,
    *,
    replicate_group: dist.ProcessGroup | None = None,
    seed: int = 0,
    begin_anew: bool = False,
) -> SyncCallback:
    """Train with ``method`` in place of data parallelism. Call it on every rank, before ``trainer.train()``.

    Two settings of the trainer change, because they would cross the slow links at every step: losses are averaged over
    this replica's tokens (``average_tokens_across_devices=False``), and DDP broadcasts no buffers unless
    ``ddp_broadcast_buffers`` says so. In training, what ``compute_loss`` gathers for metrics is this rank's alone.

    Args:
        method: made by `every_step`, `diloco`, ...
        replicate_group: of `attach`, for FSDP2; with DDP every rank is a replica.
        seed: of `attach`.
        begin_anew: what ``resume_from_checkpoint`` does with a checkpoint that has no files of a sync for these ranks:
            False refuses it, True begins a round from its weights and optimizer.

    >>> sync_with(trainer, diloco(every_steps=50))  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    Raises ``TypeError`` for what is no trainer or no method; ``ValueError`` for a trainer without
    ``torch.distributed``, one that has a sync already, one that trains now, and settings that are not served.
    ``train()`` raises what `attach` and `Attached.load` do, ``ValueError`` on all ranks that use different
    integrations or settings, and ``FileNotFoundError`` for a checkpoint without files of a sync.
    """
    _require_servable(trainer, method)
    callback = SyncCallback(trainer, method, begin_anew, {"replicate_group": replicate_group, "seed": seed})
    _send_less(trainer)
    trainer.add_callback(callback)
    callback.surround()
    return callback


class SyncCallback(TrainerCallback):  # type: ignore[misc] # a class of transformers, which is not checked with ours
    """What `sync_with` has added to a trainer.

    ``sync``: what `attach` returned, while ``train()`` runs; None before and after it. ``report``: the sync's line for
    people, after ``train()``.
    """

    def __init__(self, trainer: Trainer, method: Sync, begin_anew: bool, options: dict[str, Any]) -> None:
        self.sync: Attached | None = None
        self.report = ""
        self._trainer, self._method, self._begin_anew, self._options = trainer, method, begin_anew, options
        self._checkpoint: Path | None = None

    def surround(self) -> None:
        """Put what the trainer does not know of around its methods."""
        for name in ("evaluate", "predict", "save_model"):
            self._around(name, self._shown)
        self._around("compute_loss", self._with_own_metrics)
        self._around("log", self._with_figures)
        self._around("_save_optimizer_and_scheduler", self._save)
        self._around("_load_optimizer_and_scheduler", self._remember)

    # ---- what the trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach; the checkpoint's model, optimizer and scheduler were loaded before."""
        if self.sync is not None:  # an earlier train() was broken off
            self._detach()
        trainer, checkpoint, self._checkpoint = self._trainer, self._checkpoint, None
        require_alike(
            "dtrain.integrations.hf", resumes=checkpoint is not None, begin_anew=self._begin_anew,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )  # fmt: skip
        model = unwrapped_model(trainer.model_wrapped)
        if isinstance(model, DistributedDataParallel) and args.ddp_broadcast_buffers is None:
            model.broadcast_buffers = False
        self.sync = attach(model, trainer.optimizer, self._method, forward_steps=True, **self._options)
        if trainer.accelerator.scaler is not None:
            _scale_alike(trainer, self.sync)
        if checkpoint is not None:
            self._resume(self.sync, checkpoint)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the scheduler wait, as after an overflow. Under local updates a replica skips alone: there it goes on."""
        sync = self._attached()
        alike = sync.parameters_kind == "replicated"
        self._trainer.optimizer._is_overflow = alike and sync.skipped_in_a_row > 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the round at the end of training. A run that is stopped before can be resumed in its round."""
        if state.global_step >= state.max_steps:
            self._attached().close_round()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the round, unless the model is the best one by now, and detach."""
        sync = self._attached()
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            sync.close_round()
        self.report = sync.report()
        self._detach()

    # ---- around the trainer's methods --------------------------------------------------------------------------------

    def _around(self, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(self._trainer, name)
        setattr(self._trainer, name, functools.wraps(original)(functools.partial(replacement, original)))

    def _shown(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.sync is None:
            return original(*args, **kwargs)
        with self.sync.evaluation():
            return original(*args, **kwargs)

    def _save(self, original: Callable[[str], None], output_dir: str) -> None:
        if self.sync is None:
            original(output_dir)
            return
        with self.sync.evaluation():  # here the trainer saves models that are sharded
            original(output_dir)
            self.sync.save(Path(output_dir) / FOLDER)

    def _remember(self, original: Callable[[str], None], checkpoint: str) -> None:
        self._checkpoint = Path(checkpoint)
        original(checkpoint)

    def _with_figures(self, original: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.sync is not None and ("loss" in logs or "train_loss" in logs):
            logs |= {EXCHANGED: self.sync.meter.sent_bytes, SKIPPED: self.sync.skipped}
        original(logs, *args, **kwargs)

    def _with_own_metrics(self, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.sync is None or not model.training:
            return original(model, *args, **kwargs)
        with _not_gathered(self._trainer.accelerator):
            return original(model, *args, **kwargs)

    # ---- the sync ----------------------------------------------------------------------------------------------------

    def _attached(self) -> Attached:
        if self.sync is None:
            raise RuntimeError("the trainer trains, and its sync was not attached: on_train_begin was not called")
        return self.sync

    def _resume(self, sync: Attached, checkpoint: Path) -> None:
        folder, places = checkpoint / FOLDER, sync.pieces.channel.places
        own = folder / f"{place_name(places['replicate'], places['shard'])}{SUFFIX}"
        if any(gather_json(own.exists())):
            sync.load(folder)
        elif not self._begin_anew:
            there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "no file"
            raise FileNotFoundError(
                f"{checkpoint} has no files of a sync for these ranks: {folder} holds {there}. It was saved without "
                "dtrain, with save_only_model, or by another number of ranks. To begin a round from its weights and "
                "optimizer: sync_with(trainer, method, begin_anew=True)"
            )

    def _detach(self) -> None:
        sync, self.sync = self._attached(), None
        sync.detach()


def _require_servable(trainer: Trainer, method: Sync) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(f"sync_with got a {type(trainer).__name__}; give a transformers.Trainer, then the method")
    require_call(None, method)
    if any(isinstance(callback, SyncCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("this trainer has a sync already; call sync_with once for each trainer")
    if trainer.is_in_train:
        raise ValueError(
            "sync_with came when train() had begun (or it was broken off by an error): call it before train(), on a "
            "new trainer"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "this trainer runs in one process, without torch.distributed, so there is nothing to sync; start every "
            "replica: torchrun --nproc-per-node=2 script.py"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "this trainer uses DeepSpeed, which makes all ranks one replica; leave deepspeed out, or attach to an "
            "engine of your own (docs/own_loop.md)"
        )
    if trainer.args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint saves when a rank gets a signal, each at a step of its own, and checkpoints of a "
            "sync are of one step; set enable_jit_checkpoint=False and save every save_steps"
        )


def _send_less(trainer: Trainer) -> None:
    """Switch off what a trainer sends over the slow links at every step, and tell what cannot be switched off."""
    args = trainer.args
    args.average_tokens_across_devices = False
    remaining = []
    if args.include_num_input_tokens_seen not in ("no", False):
        remaining.append("include_num_input_tokens_seen gathers the number of tokens; set it to 'no'")
    if isinstance(trainer.train_dataset, IterableDataset) and trainer.accelerator.dispatch_batches is not False:
        remaining.append(
            "batches of an IterableDataset are read by the main process and broadcast; set accelerator_config="
            "{'dispatch_batches': False}, and let each rank read its share"
        )
    for what in remaining:
        warnings.warn(f"over the slow links at every step: {what}", RuntimeWarning, stacklevel=3)


@contextmanager
def _not_gathered(accelerator: Any) -> Iterator[None]:
    """Within it ``gather_for_metrics`` returns this rank's values: TRL calls it for its log, several times a step."""
    accelerator.gather_for_metrics = lambda values, *args, **kwargs: values
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


def _scale_alike(trainer: Trainer, sync: Attached) -> None:
    """A loss scale that all ranks change alike, with the state of the trainer's."""
    accelerator, optimizer = trainer.accelerator, trainer.optimizer
    scaler = GradScaler(sync, accelerator.device.type)
    scaler.load_state_dict(accelerator.scaler.state_dict())
    accelerator.scaler = optimizer.scaler = scaler
    step = cast(Any, unwrapped_optimizer(optimizer)).step
    optimizer._optimizer_original_step_method = step
    optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, step)
