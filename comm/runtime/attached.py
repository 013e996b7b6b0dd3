"""A sync at work on one rank: one step is one transaction, whatever the method is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from torch import Tensor

from dtrain.comm.batch_norm import Norm, pooled, recalibrated
from dtrain.comm.collectives.exchange import consolidate
from dtrain.comm.kernels import compile_what_is_due
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import Choosing
from dtrain.comm.plans.plan import kinds_of
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.method import Method
from dtrain.comm.runtime.optimizer_mode import mode_kept
from dtrain.comm.runtime.saved import EACH_SAVES
from dtrain.comm.runtime.saved_state import SavedState
from dtrain.comm.state import Kind, Numbers, State
from dtrain.comm.transports.meter import Meter

MANY_SKIPPED = 10
"""Steps in a row that nobody could make, after which it is said."""


class Attached:
    """A sync at work. Call `step` where ``optimizer.step()`` was called; clip between `finish` and `step`.

    ``method``: what it does, see `Method`. ``gauges``: of the last exchange, for metrics. ``decisions``: what the
    method has chosen by itself, for people, who take them out.
    """

    def __init__(self, context: Context, method: Method) -> None:
        self.context, self.method = context, method
        self.pieces: Pieces = context.pieces
        self.state: State = context.state
        self.plan: Choosing = context.plan
        self.meter: Meter = context.meter
        self.gauges, self.decisions = context.gauges, context.decisions
        self._live: Mapping[str, Tensor] | None = None  # while something else is shown
        self._detached = False
        self._saved = SavedState(context, method)
        context.pieces.set_gradient_exchange(method.exchange)

    # ---- one step --------------------------------------------------------------------------------------------------

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        """Try the next direction on ``loss()``, for methods of forward passes only; see `ForwardSteps.estimate`.

        Raises ``RuntimeError`` where the method is stepped from gradients.
        """
        return self.method.estimate(loss)

    def weigh(self, tokens: int) -> None:
        """Say, before `step`, how many tokens this replica's step was made from; without it a step counts as one.

        Replicas that have seen more since the last round count more in the mean. Raises ``RuntimeError`` for a method
        that counts all replicas alike.
        """
        self.method.weigh(tokens)

    def finish(self) -> None:
        """Block until the gradients are those that the optimizer may use."""
        self.pieces.finish()

    def step(self) -> bool:
        """Step the inner optimizer, then communicate what this sync communicates after it.

        Returns False if some rank's gradient was not finite: then no rank has stepped, no state has changed, and
        ``skipped`` has gone up.
        """
        self._require_live("step()")
        self.finish()
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
        """Combine now what the next step that communicates would combine; True if there was anything.

        Call it once at the end of training: the steps since the last round of a local update are lost otherwise. Every
        rank must call it. A method that communicates at every step has nothing to close.
        """
        self._require_live("close_round()")
        return self.method.close_round()

    def _warn_of_skipped(self) -> None:
        if self.skipped_in_a_row == MANY_SKIPPED and not self.method.samples:
            warnings.warn(
                f"{MANY_SKIPPED} steps in a row were skipped, step {self.steps} the last: some gradients are not "
                "finite; lower the learning rate, look at the data, or go back to a checkpoint",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip

    # ---- what feedback keeps ---------------------------------------------------------------------------------------

    def consolidate(self) -> None:
        """Give every replica the mean of what feedback keeps: nothing that is applied changes but for round-off.

        It bounds what low rank leaves in each replica where their data differ. Costs one exchange in full precision.
        Every rank must call it, between two steps.
        """
        self.pieces.channel.run(consolidate(self.state, self.pieces.place, self.context.key()), "consolidate")

    def rescale(self, factor: float) -> None:
        """Multiply what feedback keeps, when the scale of the gradients changes by ``factor``.

        Call it on every rank where a loss scale changes, with new / old; with error_feedback also where the learning
        rate does, with old / new, if what is left from before shall count as much as it would have then.

        Raises ``ValueError`` for a factor that is not positive and finite.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"factor is {factor!r}; give the new scale over the old one, a positive finite number")
        kept = {name for name, kind in kinds_of(self.plan).items() if kind != "opaque"}
        self.state.scale(kept, factor)

    # ---- evaluation and agreement ----------------------------------------------------------------------------------

    @contextmanager
    def evaluation(self, *, recalibrate: Callable[[], object] | None = None) -> Iterator[None]:
        """Within it the model holds the parameters that are to be evaluated and exported; they are not trained there.

        Every rank must enter it. ``recalibrate``: runs the model on some training batches (ten do), for BatchNorm:
        within the block its running statistics are those of these passes on all ranks, and behind it what they were.
        An optimizer that has modes (schedule-free) is given back in the one that it had.

        >>> def passes():
        ...     for batch in batches:
        ...         model(batch)
        >>> with sync.evaluation(recalibrate=passes):  # doctest: +SKIP
        ...     validate(model)
        """
        shown, norms = self.method.to_evaluate(), list[Norm]()
        live, before = self.pieces.read() if shown is not None else {}, self._live
        try:
            if shown is not None:
                self.pieces.write(shown)
                self._live = live if before is None else before
            if recalibrate is not None:
                norms = recalibrated(recalibrate)
                membership = self.context.membership
                membership.votes.run(pooled(norms, membership.together), "recalibrate")
            with mode_kept(self.pieces.optimizer):
                yield
        finally:
            for norm in norms:
                norm.put_back()
            self._live = before
            if shown is not None:
                self.pieces.write(live)

    def verify(self) -> bool:
        """Compare what must be equal on all replicas, and make it so; True if it was. Every rank must call it.

        The largest group that agrees is right, and the others take what it has, with a warning that names them. Raises
        `ReplicasDiffer` where no group is the largest, unless ``tie="first"`` says whom to take then; where replicas do
        not even hold the same tensors; and if only some were asked for their state since they were attached.
        """
        return self.method.verify()

    def digest(self) -> int:
        """A sum over every bit of every element of the parameters, in 8 bytes, the same for every sharding.

        Equal weights have equal digests. Every rank must call it.
        """
        return self.context.digest()

    def _require_live(self, what: str) -> None:
        """Raise ``RuntimeError`` within `evaluation`, at whose end whatever ``what`` changes would be lost."""
        self._saved.require_read()
        if self._detached:
            raise RuntimeError(f"{what} after detach() was called: attach the model again, or step its own optimizer")
        if self._live is not None:
            raise RuntimeError(
                f"{what} within sync.evaluation(), where the model holds what is to be evaluated; call it behind that "
                "block"
            )

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """This rank's state, by its place: ``{"replica-0-of-2.shard-0-of-1": {"tensors": ..., "numbers": ..., ...}}``.

        Plain tensors, numbers and text; see `dtrain.comm.runtime.saved`. Each rank has its own, and every rank must
        call it at the same step and save what it gets. "parameters" is a digest of this rank's parameters, which are
        saved apart; taken within `evaluation`, a state holds also the live ones, and brings them back.
        """
        return self._saved.state_dict(self._live)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict`, after the model's and the optimizer's own states have been loaded.

        Every rank must call it, with its own state or with what was put together of several ranks'. Raises
        ``ValueError`` for the state of another rank, of another method, or one with other settings, for one of which a
        part is missing, if the model does not hold the parameters that this rank had when the state was taken, and if
        the ranks' states are of different steps. ``state | {"sync": None}`` is loaded as far as the names of what both
        keep agree.
        """
        self._saved.load(state)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{self.context.description.partition(':')[0]} is at work in this process, between its model and the "
            f"links, and cannot be pickled or copied; save its state. {EACH_SAVES}"
        )

    def numbers(self) -> Numbers:
        """The counters that a checkpoint keeps."""
        return self._saved.numbers()

    def report(self) -> str:
        """One line for people: what was sent and what it cost."""
        meter = self.meter
        sent = f"{meter.sent_bytes / 1e6:.1f} MB" if meter.sent_bytes >= 1e5 else f"{meter.sent_bytes:,} bytes"
        line = f"{self.steps} steps, {self.skipped} skipped, sent {sent}, {meter.exposed_seconds:.2f} s exposed"
        return line + self.method.report()

    def detach(self) -> None:
        """Stop syncing and leave the model as it was found."""
        self._detached = True
        self.context.membership.leave()
        self.method.detach()
        self.pieces.detach()
        self.pieces.channel.close()
        self.context.membership.close()
        self._saved.require_read()

    # ---- to be read ------------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way: among `Members` the only time at which a checkpoint can be taken."""
        return self.method.quiet

    @property
    def parameters_kind(self) -> Kind:
        """Whether the live parameters and the inner optimizer's state are equal on all replicas."""
        return self.context.parameters_kind

    @property
    def steps(self) -> int:
        return self.context.steps

    @property
    def skipped(self) -> int:
        return self.context.skipped

    @property
    def skipped_in_a_row(self) -> int:
        return self.context.skipped_in_a_row

    @property
    def repairs(self) -> int:
        return self.context.repairs
