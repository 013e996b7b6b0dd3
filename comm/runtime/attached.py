"""A sync at work on one rank: for every method one step is one transaction."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from dtrain.comm.kernels import compile_what_is_due
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import Choosing
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.evaluation import Evaluation, Shown
from dtrain.comm.runtime.kept_by_feedback import KeptByFeedback
from dtrain.comm.runtime.method import Method
from dtrain.comm.runtime.saved import EACH_SAVES
from dtrain.comm.runtime.saved_state import SavedState
from dtrain.comm.state import Kind, Numbers, State
from dtrain.comm.transports.meter import Meter

if TYPE_CHECKING:
    from dtrain.comm.adapters.rank_files import RankCheckpoint, RankFiles

MANY_SKIPPED = 10
"""Steps skipped in a row, after which a warning is raised."""


class Attached:
    """A sync at work. Call `step` where ``optimizer.step()`` was called; clip between `finish` and `step`.

    ``method``: see `Method`. ``feedback``: what error feedback keeps. ``gauges``: of the last exchange, for metrics.
    ``decisions``: choices that the method has made, as text; their reader clears the list. ``may_compile``: kernels,
    between steps; it takes seconds. ``saved``: saves and loads `state_dict`. ``files``: where a model is
    attached, what `save` and `load` use.
    ``forwards_steps``: whether ``optimizer.step()`` is `step`.
    """

    def __init__(self, context: Context, method: Method) -> None:
        self.context, self.method = context, method
        self.pieces: Pieces = context.pieces
        self.state: State = context.state
        self.plan: Choosing = context.plan
        self.meter: Meter = context.meter
        self.gauges, self.decisions = context.gauges, context.decisions
        self.feedback = KeptByFeedback(context)
        self._shown = Shown(context, method)
        self._detached = False
        self.may_compile = True
        self.files: RankFiles | None = None
        self.forwards_steps = False
        self.saved = SavedState(context, method)
        context.pieces.set_gradient_exchange(method.exchange)

    # ---- one step --------------------------------------------------------------------------------------------------

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        """Try the next direction on ``loss()``, for methods of forward passes only; see `ForwardSteps.estimate`.

        Raises ``RuntimeError`` where the method is stepped from gradients.
        """
        return self.method.estimate(loss)

    def weigh(self, tokens: int) -> None:
        """Set, before `step`, how many tokens this replica's step was made from; 1 by default.

        Replicas that have seen more tokens since the last round weigh more in the mean. Raises ``RuntimeError`` for a
        method that weighs all replicas alike.
        """
        self.method.weigh(tokens)

    def finish(self) -> None:
        """Block until the gradients are those that the optimizer may use."""
        self.pieces.finish()

    def step(self) -> bool:
        """Step the inner optimizer, then communicate what the method exchanges after a step.

        Returns False if some rank's gradient was not finite: then no rank has stepped (under local updates no rank of
        this replica), no state has changed, and ``skipped`` has gone up.
        """
        self._require_live("step()")
        self.finish()
        if self.may_compile:
            compile_what_is_due()
        context, method = self.context, self.method
        ok = method.prepare()
        if ok:
            context.state.commit()
            method.advance()
            context.skipped_in_a_row = 0
        else:
            context.state.rollback()
            method.skip()
            context.skipped += 1
            context.skipped_in_a_row += 1
            self._warn_of_skipped()
        context.steps += 1
        method.after_step()
        return ok

    def close_round(self) -> bool:
        """Exchange now what the next step with an exchange would send; True if there was anything.

        Call it once at the end of training: the steps since the last round of a local update are lost otherwise. Every
        rank must call it. A method that communicates in every step has no open round.
        """
        self._require_live("close_round()")
        return self.method.close_round()

    def _warn_of_open_round(self) -> None:
        if self.method.in_round and self.saved.kept_at != self.steps and not self._detached and sys.exception() is None:
            warnings.warn(
                f"detach() at step {self.steps}, within a round: the replicas differ by their steps since the last "
                "exchange, and another attach() gives all of them replica 0's parameters; call close_round() before it",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip

    def _warn_of_skipped(self) -> None:
        if self.skipped_in_a_row == MANY_SKIPPED and not self.method.samples:
            warnings.warn(
                f"{MANY_SKIPPED} steps in a row were skipped, step {self.steps} the last: some gradients are not "
                "finite; lower the learning rate, look at the data, or go back to a checkpoint",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip

    # ---- evaluation and agreement ----------------------------------------------------------------------------------

    def evaluation(self, *, recalibrate: Callable[[], object] | None = None) -> Evaluation:
        """A block within which the model holds the parameters to evaluate and export; do not train there.

        Every rank must enter it. For callbacks that come in pairs: `Evaluation.enter` and `Evaluation.leave`.
        ``recalibrate``: runs the model on some training batches (ten do), for BatchNorm: within the block its running
        statistics are those of these passes on all ranks; they are restored after it. An optimizer with modes
        (schedule-free) is left in the mode that it had.

        >>> def passes():
        ...     for batch in batches:
        ...         model(batch)
        >>> with sync.evaluation(recalibrate=passes):  # doctest: +SKIP
        ...     validate(model)
        """
        return Evaluation(partial(self._shown.shown, recalibrate), self._shown.paused)

    def verify(self) -> bool:
        """Compare what must be equal on all replicas, and repair it; True if it was equal. Every rank must call it.

        The largest group of equal replicas is right, and the others copy its values, with a warning that names them.
        Raises `ReplicasDiffer` where no group is the largest, unless ``tie="first"``; where replicas hold different
        tensors; and where some have saved their state more often than others.
        """
        return self.method.verify()

    def digest(self) -> int:
        """A sum over every bit of every element of the parameters, in 8 bytes, the same for every sharding.

        Equal weights have equal digests. Every rank must call it.
        """
        return self.context.digest()

    def _require_live(self, call: str) -> None:
        """Raise ``RuntimeError`` within `evaluation`, at whose end changes by ``call`` would be lost."""
        self.saved.require_read()
        if self._detached:
            raise RuntimeError(f"{call} after detach() was called: attach the model again, or step its own optimizer")
        if self._shown.live is not None:
            raise RuntimeError(
                f"{call} within sync.evaluation(), where the model holds what is to be evaluated; call it behind that "
                "block"
            )
        if self.files is not None:
            self.files.require_kept()

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """This rank's state, by its place: ``{"replica-0-of-2.shard-0-of-1": {"tensors": ..., "numbers": ..., ...}}``.

        Plain tensors, numbers and text; see `dtrain.comm.runtime.saved`. Every rank must call it at the same step, and
        save its own. "parameters" is a digest of this rank's parameters, which are saved separately; a state taken
        within `evaluation` also holds the live ones, and restores them.
        """
        return self.saved.state_dict(self._shown.live)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Resume from a `state_dict`, after the model's and the optimizer's states were loaded.

        Every rank must call it, with its own state or with several ranks' merged. Raises ``ValueError`` for the state
        of another rank, of another method, or with other settings; for an incomplete one; if the model does not hold
        the parameters that this rank had when the state was taken; and if the ranks' states are of different steps.
        ``state | {"sync": None}`` is loaded even if method or settings differ, if the names of its entries are this
        sync's.
        """
        self.saved.load(state)

    def save(self, folder: str | Path) -> None:
        """Write what this rank needs to go on into a file of its own in ``folder``: trained parameters, buffers, the
        optimizer's state and hyperparameters, and the sync's state. Every rank must call it, at the same step, also
        within `evaluation`; it returns when the files of all ranks are there. ``folder``: one that all ranks see, or
        one of each machine's own.

        Raises ``OSError`` where a file could not be written, and ``RuntimeError`` on the other ranks; ``TypeError`` for
        an optimizer whose state is more than tensors, numbers and text.
        """
        self._require_files().save(Path(folder))

    def load(self, folder: str | Path) -> None:
        """Undo `save`, or a ``dcp.save`` of `checkpoint`, before the first step. Every rank must call it.

        On the same replicas and shards bitwise. On others each rank's part is made of those of all ranks, which every
        rank has to see in ``folder``: exact with as many replicas; with another number what each replica had of its own
        becomes the mean over them, see `dtrain.comm.adapters.other_mesh`. A warning says so.
        No code in either is run; ``dcp.load`` itself unpickles what it reads.

        Raises ``FileNotFoundError`` if a rank's file is missing, ``ValueError`` for a damaged one, for another model,
        optimizer or sync, and for files of different steps; ``TypeError`` for one without a sync's state;
        ``RuntimeError`` where another rank has refused its file. Nothing is changed then.
        """
        self._require_files().load(Path(folder))

    @property
    def checkpoint(self) -> RankCheckpoint:
        """What `save` writes, for ``torch.distributed.checkpoint``: every rank's part in one folder of all ranks.

        It holds parameters and optimizer; what else is in the checkpoint (schedulers, a model for other programs)
        stands beside it. ``async_save`` may go on while training does: the part is a copy.

        >>> dcp.save({"dtrain": sync.checkpoint, "scheduler": scheduler}, checkpoint_id=folder)  # doctest: +SKIP
        >>> dcp.load({"dtrain": sync.checkpoint, "scheduler": scheduler}, checkpoint_id=folder)  # doctest: +SKIP

        Loading raises as `load` does. DCP loads what stands in its dictionary in the order of names; the model's and
        the optimizer's own entries have to come before this one, or be left out. On another number of ranks leave this
        one out of ``dcp.load``, and call ``load(folder)`` behind it.
        """
        from dtrain.comm.adapters.rank_files import RankCheckpoint

        return RankCheckpoint(self._require_files())

    def _require_files(self) -> RankFiles:
        if self.files is None:
            raise TypeError("this sync has no model around its pieces, so no files; save its state_dict()")
        return self.files

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{self.context.description.partition(':')[0]} is at work in this process, between its model and the "
            f"links, and cannot be pickled or copied; save its state. {EACH_SAVES}"
        )

    def report(self) -> str:
        """One line of text: steps, bytes sent, and exposed communication."""
        meter = self.meter
        sent = f"{meter.sent_bytes / 1e6:.1f} MB" if meter.sent_bytes >= 1e5 else f"{meter.sent_bytes:,} bytes"
        line = f"{self.steps} steps, {self.skipped} skipped, sent {sent}, {meter.exposed_seconds:.2f} s exposed"
        return line + self.method.report()

    def detach(self, *, saved: bool = False) -> None:
        """Stop communicating and restore the model as it was before `attach`; its parameters stay.

        Warns within a round of local updates, whose steps only this replica has, unless its state was just taken, by
        this sync or by other means (``saved``), or an exception is on its way.
        """
        if not saved:
            self._warn_of_open_round()
        self._detached = True
        self.context.membership.leave()
        self.method.detach()
        self.pieces.detach()
        self.pieces.channel.close()
        self.context.membership.close()
        self.saved.require_read()

    # ---- properties ------------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Whether no exchange is under way: with `Members` a checkpoint can be taken only then."""
        return self.method.quiet

    @property
    def parameters_kind(self) -> Kind:
        """Whether the live parameters and the inner optimizer's state are equal on all replicas."""
        return self.context.parameters_kind

    @property
    def numbers(self) -> Numbers:
        """The counters that a checkpoint keeps."""
        return self.saved.numbers()

    @property
    def steps(self) -> int:
        return self.context.steps

    @property
    def rounds(self) -> int:
        """Rounds of a local update that were applied, each fragment's counted: the same on all ranks."""
        return self.method.rounds

    @property
    def skipped(self) -> int:
        return self.context.skipped

    @property
    def skipped_in_a_row(self) -> int:
        return self.context.skipped_in_a_row

    @property
    def repairs(self) -> int:
        return self.context.repairs
