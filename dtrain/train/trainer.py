"""The training loop: one rank of one run, from an existing process group to a summary.

    batch -> engine.forward_backward -> sync.finish -> clip -> sync.step -> report, evaluate, checkpoint

`train` may be called in any process that has joined a process group of the right size; the command ``dtrain train``
does so in its workers, tests do it in theirs.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from dtrain.comm.batch_norm import gathers
from dtrain.errors import TooManySkippedSteps
from dtrain.train.checkpoint.folders import write_text_durably
from dtrain.train.checkpointing import Checkpoints
from dtrain.train.config import Config
from dtrain.train.evaluation import evaluate
from dtrain.train.failure_memory import final, may_pass
from dtrain.train.mesh import build_mesh
from dtrain.train.metrics import MetricsWriter, Row, cut
from dtrain.train.results import Measured, Outcome, Reason, summarize, write_traffic
from dtrain.train.setup import build
from dtrain.train.stepping import Stepper
from dtrain.train.time_limit import TIME_LIMIT, Clock
from dtrain.train.totals import Account
from dtrain.train.votes import Control, Report

__all__ = ["Outcome", "train"]

COMPILING_SECONDS = 60.0  # for a kernel, on hosts that are busy
STATE_BYTES = 16  # per parameter: itself, two moments and a residual, fp32
NORM_BATCHES = 10  # training batches whose statistics BatchNorm is evaluated with at the anchor


def train(
    config: Config,
    *,
    requested: Callable[[], int] = lambda: 0,
    clock: Clock | None = None,
    attempt: str = "0",
    on_step: Callable[[int], None] = lambda step: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Train as ``config`` says, from the newest checkpoint if there is one. Collective over the default group.

    Args:
        config: frozen; every rank has the same.
        requested: the signal that asked this rank to stop, or 0. Acted on when all ranks have heard of it.
        clock: the scheduler's time limit; none by default.
        attempt: differs between processes that may write into the same run folder one after the other.
        on_step: called after each step with its number (fault injection in tests).
        on_row: called on rank 0 with each row that goes into metrics.jsonl.

    Raises ``TooManySkippedSteps``, ``NotFinite``, and what data sets, models, engines and checkpoints raise; before the
    first step was done ``FailedAtTheStart`` instead of most of it, and ``FailedTwice`` where an attempt before this one
    failed in the same way at the same step.
    """
    run: _Run | None = None
    try:
        run = _Run(config, requested, clock or Clock(None), attempt)
        run.on_row = on_row
        return run.loop(on_step)
    except Exception as error:
        if may_pass(error):
            raise
        step, rank = (run.attached.steps, run.mesh.rank) if run else (0, 0)
        instead = final(error, step=step, rank=rank, folder=Path(config.run.dir))
        if instead is None:
            raise
        traceback.print_exception(error)  # into this rank's log, all of it
        # With the traceback of the error itself, whose last frame is where a person has to look.
        raise instead.with_traceback(error.__traceback__) from None
    finally:
        if run:
            run.close()


class _Run:
    def __init__(self, config: Config, requested: Callable[[], int], clock: Clock, attempt: str) -> None:
        self.config, self.requested, self.clock = config, requested, clock
        self.folder = Path(config.run.dir)
        transport = cast(Literal["torch", "mpi"], config.mesh.transport)
        self.mesh = build_mesh(config.mesh.replicate, config.mesh.shard, transport)
        self.control = Control(self.mesh.control)
        self.parts = build(config, self.mesh)
        self.attached, self.engine = self.parts.attached, self.parts.engine
        self.account = Account(self.mesh.channel.meter, self.mesh.control.meter)
        self.checkpoints = Checkpoints(config, self.mesh, self.parts, self.account, self.control, attempt)
        self.clock.expect_checkpoint(STATE_BYTES * sum(piece.numel for piece in self.engine.pieces.segments.values()))
        self.stepper = Stepper(self.parts, self.account)
        self.due = False  # a checkpoint, which waits for a step that is not skipped
        self.metrics = self._metrics()
        self.first_step, self.started = self.attached.steps, time.monotonic()
        self.plan_changes = self.attached.plan.changes
        self.validation_loss: float | None = None
        self.last_loss: float | None = None
        self.on_row: Callable[[Row], None] = lambda row: None

    def _metrics(self) -> MetricsWriter:
        step = self.attached.steps
        writes = self.mesh.rank == 0
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / "metrics.jsonl").exists():
                cut(self.folder / "metrics.jsonl", step if self.checkpoints.resumed_from else -1)
        settings = dataclasses.asdict(self.config) if writes else {}
        return MetricsWriter(
            self.folder, enabled=writes, purge_step=step + 1, sinks=self.config.metrics, settings=settings
        )

    def loop(self, on_step: Callable[[int], None]) -> Outcome:
        settings = self.config.train
        end = min(settings.steps, settings.stop_after_steps or settings.steps)
        stop = 0
        self.clock.check()
        for text in self.checkpoints.damaged:
            self._log({"step": self.attached.steps, "decision": text})
        if self.attached.steps == 0:
            self._evaluate()
        while self.attached.steps < end and not stop:
            report = self._step()
            step = self.attached.steps
            if step % settings.agree_every_steps == 0 or step % settings.log_every_steps == 0 or step == end:
                stop = self._collect() or stop
                self._start(step, report)
            if settings.evaluate_every_steps and step % settings.evaluate_every_steps == 0 and step != end:
                stop = self._collect() or stop
                self._evaluate()
            every = settings.checkpoint_every_steps
            self.due = (self.due or (every > 0 and step % every == 0)) and step != end
            if self.due:
                stop = self._collect() or stop
                self.due = not self._checkpoint()
            self._tell_decisions()
            on_step(step)
        self._collect()
        return self._finish(end, stop)

    def _step(self) -> Report:
        """One optimizer step on this rank's share of the global batch."""
        settings, step = self.config.train, self.attached.steps
        loss = self.stepper.step(lambda: not self.clock.due(COMPILING_SECONDS))
        if self.attached.skipped_in_a_row > settings.max_skipped_steps:
            raise TooManySkippedSteps(
                f"step {step}: {self.attached.skipped_in_a_row} steps in a row had no finite gradient or loss, more "
                f"than train.max_skipped_steps={settings.max_skipped_steps}; {self.checkpoints.way_out()}"
            )
        tokens = settings.batch_size * self.parts.tokens_per_example
        self.account.tokens += tokens
        return Report(self._asked(), float(loss), tokens // self.mesh.world)

    def _tell_decisions(self) -> None:
        """What the sync has decided goes into the metrics; a new plan into rank 0's log and the run folder."""
        decisions = self.attached.decisions
        while decisions:
            text = decisions.pop(0)
            self._log({"step": self.attached.steps, "decision": text})
        if self.attached.plan.changes != self.plan_changes:
            self.plan_changes = self.attached.plan.changes
            if self.mesh.rank == 0:
                text = f"step {self.attached.steps}: {self.attached.plan.table()}"
                print(text, flush=True)
                write_text_durably(self.folder / "plan.txt", text + "\n")

    def _asked(self) -> int:
        """The signal that asks this rank to stop, ``TIME_LIMIT`` where the limit is near, or 0."""
        taken = self.attached.steps - self.first_step
        between = 2 * self.config.train.agree_every_steps * (time.monotonic() - self.started) / max(1, taken)
        return self.requested() or (TIME_LIMIT if self.clock.due(between) else 0)

    def _start(self, step: int, report: Report) -> None:
        """Send this step's report; its row of metrics is written when everybody's has arrived."""
        self.control.start(report)
        self._row = {
            "step": step,
            "tokens": self.account.tokens,
            "seconds": self.account.seconds,
            "sent_bytes": self.account.sent_bytes,
            "exposed_seconds": self.account.exposed_seconds,
            **self.account.split,
            "learning_rate": self.parts.learning_rate(step - 1),
            "gradient_norm": self.engine.gradient_norm,
            "skipped_steps": self.attached.skipped,
            **self.attached.gauges,
        }

    def _collect(self) -> int:
        """Read what was started, write its row if it is one to be logged, and return the signal to stop for, or 0."""
        with self.account.step():
            total = self.control.collect()
        if total is None:
            return 0
        self.last_loss = total.loss
        step = self._row["step"]
        if step % self.config.train.log_every_steps == 0 or step == self.config.train.steps:
            self._log({"step": int(step), "loss": total.loss, **self._row})
        return total.stop

    def _evaluate(self) -> None:
        if self.parts.held_out is None:
            return
        with self.attached.evaluation(recalibrate=self._norms_anew()):
            self.validation_loss = evaluate(
                self.engine, self.parts.held_out, self.config.train.evaluation_examples, self.mesh, self.control
            )
        self._log({"step": self.attached.steps, "validation_loss": self.validation_loss})

    def _norms_anew(self) -> Callable[[], None] | None:
        """Forward passes for running statistics that fit the anchor; None where there are none, or no anchor."""
        if self.attached.parameters_kind != "per_worker" or not any(map(gathers, self.parts.model.modules())):
            return None
        share = self.parts.share

        def passes() -> None:
            for step in range(NORM_BATCHES):
                self.engine.evaluate(share.first_microbatch(step))

        return passes

    def _log(self, row: Row) -> None:
        self.metrics.write(row)
        if self.mesh.rank == 0:
            self.on_row(row)

    def _checkpoint(self) -> bool:
        """Write one if one may be written now; whether it was."""
        written = self.checkpoints.write()
        self.clock.checkpoint_seconds = self.checkpoints.seconds
        return written

    def _finish(self, end: int, stop: int) -> Outcome:
        """The last checkpoint, the export and the summary; what is already there stays.

        Raises ``TooManySkippedSteps`` where the last steps before ``end`` were skipped, ``NotFinite`` for NaN in them.
        """
        step = self.attached.steps
        finished = step >= self.config.train.steps
        reason: Reason = "finished" if finished else ("stopped" if step == end else "signal")
        withheld = False
        if self.checkpoints.written_at != step:
            if finished:
                self.attached.close_round()
            if step == end:
                self._evaluate()
            withheld = not self._checkpoint()
        if withheld and reason != "signal":
            raise self.checkpoints.none_at_the_end()
        skipped = max(int(row[0]) for row in self.control.rows([self.attached.skipped], "checkpoint"))
        outcome = Outcome(reason, step, stop if reason == "signal" else 0, withheld)
        write_traffic(self.folder, self.mesh.rank, self.account.meters)
        if self.mesh.rank == 0:
            if reason != "signal":
                measured = Measured(self.last_loss, self.validation_loss, skipped)
                saved = cast(Path, self.checkpoints.saved)
                summarize(self.config, self.mesh, self.parts, self.account, saved, measured)
            outcome.write(self.folder)
        self.control.barrier()
        return outcome

    def close(self) -> None:
        self.metrics.close()
        self.attached.detach(saved=True)  # in a checkpoint, if the run is not at its end
        self.mesh.control.close()
        self.engine.close()
        self.mesh.close()
