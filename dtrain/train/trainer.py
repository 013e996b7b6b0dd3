"""The training loop: one rank of one run, from an existing process group to a summary.

    batch -> engine.forward_backward -> sync.finish -> clip -> sync.step -> report, evaluate, checkpoint

`train` may be called in any process that has joined a process group of the right size; the command ``dtrain train``
does so in its workers, tests do it in theirs.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dtrain.comm.batch_norm import RunningStatistics, gathers
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DtrainError,
    FailedAtTheStart,
    FailedTwice,
    ModelError,
    NotFinite,
    TooManySkippedSteps,
)
from dtrain.launchers import strict_json
from dtrain.launchers.failure import CONSEQUENCE
from dtrain.report.summary import Summary
from dtrain.train import model_snapshot as snapshot
from dtrain.train import rng
from dtrain.train.checkpoint import Placement, export, load, read_manifest, write
from dtrain.train.checkpoint.finite import first_not_finite
from dtrain.train.checkpoint.folders import step_of, write_text_durably
from dtrain.train.checkpoint.state import OPAQUE
from dtrain.train.checkpoint.weights import put_into, weights_of
from dtrain.train.checkpoint_choice import find_checkpoint, own_checkpoint
from dtrain.train.config import Config, instantiate, run_folder
from dtrain.train.config.data_contract import DATA, check_content
from dtrain.train.config.model_factory import build_model
from dtrain.train.data.batches import fetch, positions
from dtrain.train.data.order import example_at
from dtrain.train.engines import Engine, EngineOptions, build_engine
from dtrain.train.engines.engine import Batch
from dtrain.train.evaluation import evaluate
from dtrain.train.failure_memory import Failed
from dtrain.train.lr import learning_rate_factor
from dtrain.train.mesh import build_mesh
from dtrain.train.metrics import MetricsWriter, cut
from dtrain.train.metrics.rows import Row
from dtrain.train.time_limit import TIME_LIMIT, Clock
from dtrain.train.totals import Account
from dtrain.train.votes import Control, Report

NORM_BATCHES = 10  # training batches whose statistics BatchNorm is evaluated with at the anchor

Reason = Literal["finished", "stopped", "signal"]


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: at which step, and why. ``signal``: the number of the signal, or 0.

    ``withheld``: there is no checkpoint of that step, as steps were being skipped when the signal came.
    """

    reason: Reason
    step: int
    signal: int
    withheld: bool = False


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
        if _may_pass(error):
            raise
        final = _final(error, run, Path(config.run.dir))
        if final is None:
            raise
        traceback.print_exception(error)  # into this rank's log, all of it
        # With the traceback of the error itself, whose last frame is where a person has to look.
        raise final.with_traceback(error.__traceback__) from None
    finally:
        if run:
            run.close()


def _may_pass(error: Exception) -> bool:
    """Whether it need not happen again. Errors of ours say so by their exit code; disks and links may be back."""
    of_links = type(error).__module__.startswith("torch.distributed") or CONSEQUENCE.search(str(error)) is not None
    return isinstance(error, DtrainError | OSError) or of_links


def _final(error: Exception, run: _Run | None, folder: Path) -> DtrainError | None:
    """What to raise instead, so that nobody starts the run again; None if a restart may help, as far as is known."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    what = f"{type(error).__name__}: {error}{notes}"
    step = run.attached.steps if run else 0
    if run is None or not step:
        return FailedAtTheStart(f"{what}; no step was done yet, so it would happen again: not started again")
    if Failed(step, what).again(folder, run.mesh.rank):
        return FailedTwice(f"{what}; step {step} failed like this before it was started again, too: not started again")
    return None


class _Run:
    def __init__(self, config: Config, requested: Callable[[], int], clock: Clock, attempt: str) -> None:
        self.config, self.requested, self.clock, self.attempt = config, requested, clock, attempt
        self.folder = Path(config.run.dir)
        transport = cast(Literal["torch", "mpi"], config.mesh.transport)
        self.mesh = build_mesh(config.mesh.replicate, config.mesh.shard, transport)
        self.control = Control(self.mesh.control)
        self.place = Placement(
            replica=self.mesh.replica, replicas=self.mesh.replicas, shard=self.mesh.shard, shards=self.mesh.shards
        )
        self.data: Any = instantiate(config.data, "data", split="train")
        self._check_data()
        self.held_out: Any = None
        if config.train.evaluation_examples:
            self.held_out = instantiate(config.data, "data", split="validation")
        self.tokens_per_example = int(cast(Any, self.data).tokens_per_example)
        rng.seed_everything(config.train.seed)
        self.model = build_model(config.model, self.data)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ModelError(f"model: {config.model['_target_']} has no parameter that requires a gradient")
        if config.run.weights:
            self._begin_with(Path(config.run.weights))
        self.engine = self._engine()
        self.sync = cast(Sync, instantiate(config.sync, "sync"))
        self.attached: Attached = self.sync.bind(self.engine.pieces, config.train.seed)
        self.account = Account(self.mesh.channel.meter, self.mesh.control.meter)
        self.damaged: list[str] = []
        self.resumed_from = self._resume()
        self.saved = self.resumed_from if own_checkpoint(self.resumed_from, self.folder) else None
        self.statistics = RunningStatistics(self.model)
        self.due = False  # a checkpoint, which waits for a step that is not skipped
        self.not_finite, self.withheld = "", 0  # why one could not be written, and how often in a row
        self.metrics = self._metrics()
        self.first_step, self.started = self.attached.steps, time.monotonic()
        self.plan_changes = self.attached.plan.changes
        self.validation_loss: float | None = None
        self.last_loss: float | None = None
        self.on_row: Callable[[Row], None] = lambda row: None

    def _check_data(self) -> None:
        """Whether the data are still those that the run was launched with: a restart or a requeue checks nothing else.

        Raises ``DataError``. One rank of each machine looks.
        """
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        description, path = self.data.describe(), self.folder / DATA
        known = path.is_file() and run_folder.has_digest(strict_json.read(path))
        changed = run_folder.other_data(self.folder, description) if known else ""
        if changed:
            raise DataError(f"the data have changed since the run was launched: {changed}; bring the same files back")
        check_content(self.config, self.data, description)

    def _begin_with(self, path: Path) -> None:
        """Raises ``ConfigError``: what is wrong with a file that a run begins with is so at each start."""
        try:
            put_into(self.model, weights_of(path, dict(self.model.named_parameters())), f"run.weights={path}")
        except CheckpointError as error:
            raise ConfigError(f"{error}; give a safetensors file, a checkpoint or a run of this model") from error

    def _engine(self) -> Engine:
        config = self.config
        share = config.train.batch_size // self.mesh.world
        micro = config.train.microbatch_size or share
        options = EngineOptions(
            precision=config.engine.precision,
            activation_checkpointing=config.engine.activation_checkpointing,
            bucket_mib=config.engine.bucket_mib,
            clip_norm=config.train.clip_norm,
            microbatches=share // micro,
            microbatch_size=micro,
            unused_parameters=config.engine.unused_parameters,
        )
        self.peak_lr = float(cast(float, config.optim.inner.get("lr", 1e-3)))

        def optimizer(parameters: object) -> torch.optim.Optimizer:
            return cast(torch.optim.Optimizer, instantiate(config.optim.inner, "optim.inner", params=parameters))

        return build_engine(config.engine.name, self.model, optimizer, self.mesh, options)

    def _resume(self) -> Path | None:
        """Go on from the newest checkpoint, if there is one: sets parameters, state, generators and accounts."""
        seed, rank = self.config.train.seed, self.mesh.rank
        path = find_checkpoint(self.config, self.damaged.append)
        if path is None:
            rng.seed_everything(seed, rank)
            return None
        pieces = self.engine.pieces
        state = load(path, place=self.place, segments=snapshot.wanted(pieces), shapes=pieces.shapes)
        snapshot.put_back(state, self.attached, self.model)
        if state.rng:
            rng.restore(state.rng)
        else:  # another number of ranks: each starts a stream of its own, declared by the checkpoint as translated
            rng.seed_everything(seed, rank, self.attached.steps)
        self.account.restore(read_manifest(path).meta)
        if rank == 0:
            print(f"resumed from {path}", *(f"  {name}: {how}" for name, how in state.translated.items()), sep="\n")
        return path

    def _metrics(self) -> MetricsWriter:
        step = self.attached.steps
        writes = self.mesh.rank == 0
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / "metrics.jsonl").exists():
                cut(self.folder / "metrics.jsonl", step if self.resumed_from else -1)
        return MetricsWriter(self.folder, enabled=writes, purge_step=step + 1)

    def loop(self, on_step: Callable[[int], None]) -> Outcome:
        settings = self.config.train
        end = min(settings.steps, settings.stop_after_steps or settings.steps)
        stop = 0
        self.clock.check()
        for text in self.damaged:
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
        with self.account.step():
            share = positions(step, batch_size=settings.batch_size, rank=self.mesh.rank, world=self.mesh.world)
            indices = [example_at(settings.seed, position, len(self.data)) for position in share]
            size = self.engine.options.microbatch_size
            parts = [indices[start : start + size] for start in range(0, len(indices), size)]
            batches = [self._to_device(fetch(self.data, part)) for part in parts]
            self.engine.set_learning_rate(self.peak_lr * self._lr_factor(step))
            self.statistics.keep()
            with self.account.computing():
                loss: float | Tensor  # a tensor is not looked at before all is under way
                if self.attached.method.samples:
                    loss = self._tried(batches)
                else:
                    loss = self.engine.forward_backward(batches)
                    self.attached.finish()
                    self.engine.clip()
                if not self.attached.step():
                    self.statistics.put_back()
        if self.attached.skipped_in_a_row > settings.max_skipped_steps:
            raise TooManySkippedSteps(
                f"step {step}: {self.attached.skipped_in_a_row} steps in a row had no finite gradient or loss, more "
                f"than train.max_skipped_steps={settings.max_skipped_steps}; {self._way_out()}"
            )
        self.account.tokens += settings.batch_size * self.tokens_per_example
        return Report(self._asked(), float(loss), len(indices) * self.tokens_per_example)

    def _tried(self, batches: Sequence[Batch]) -> float:
        """Every direction of this step on these batches, forward only; the mean loss of this replica."""
        examples = [len(next(iter(batch.values()))) for batch in batches]

        def loss() -> Tensor:
            parts = [self.engine.evaluate(batch) * count for batch, count in zip(batches, examples, strict=True)]
            return torch.stack(parts).sum() / sum(examples)

        samples = self.attached.method.samples
        return sum(self.attached.estimate(loss) for _ in range(samples)) / samples

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

    def _lr_factor(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate_factor(
            step,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.train.steps,
            final_fraction=optim.final_lr_fraction,
        )

    def _start(self, step: int, report: Report) -> None:
        """Send this step's report; its row of metrics is written when everybody's has arrived."""
        self.control.start(report)
        self._row = {
            "step": step,
            "tokens": self.account.tokens,
            "seconds": self.account.seconds,
            "sent_bytes": self.account.sent_bytes,
            "exposed_seconds": self.account.exposed_seconds,
            "learning_rate": self.peak_lr * self._lr_factor(step - 1),
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
        if self.held_out is None:
            return
        with self.attached.evaluation(recalibrate=self._norms_anew()):
            self.validation_loss = evaluate(
                self.engine, self.held_out, self.config.train.evaluation_examples, self.mesh, self.control
            )
        self._log({"step": self.attached.steps, "validation_loss": self.validation_loss})

    def _norms_anew(self) -> Callable[[], None] | None:
        """Forward passes for running statistics that fit the anchor; None where there are none, or no anchor."""
        if self.attached.parameters_kind != "per_worker" or not any(map(gathers, self.model.modules())):
            return None
        settings, size = self.config.train, self.engine.options.microbatch_size

        def passes() -> None:
            for step in range(NORM_BATCHES):
                share = positions(step, batch_size=settings.batch_size, rank=self.mesh.rank, world=self.mesh.world)
                indices = [example_at(settings.seed, position, len(self.data)) for position in share][:size]
                self.engine.evaluate(self._to_device(fetch(self.data, indices)))

        return passes

    def _log(self, row: Row) -> None:
        self.metrics.write(row)
        if self.mesh.rank == 0:
            self.on_row(row)

    def _checkpoint(self) -> bool:
        """Write one, unless steps are being skipped or a rank's state is not finite; whether it was written.

        What is committed then would soon be all that is left, as old ones are deleted.

        Raises ``NotFinite`` for a state that does not become finite although no step is skipped.
        """
        started = time.monotonic()
        state = snapshot.capture(self.attached, self.model)
        # All ranks have the same sections and parameters, so that two numbers say which of them it is.
        sections, fqns = [*sorted(state.kinds), OPAQUE], sorted(self.engine.pieces.shapes)
        bad = first_not_finite(state)
        mine = [sections.index(bad[0]) + 1, fqns.index(bad[1].rpartition(" of ")[2])] if bad else [0, 0]
        rows = self.control.rows([self.attached.skipped_in_a_row, *mine], "checkpoint")
        found = ((rank, int(section), int(fqn)) for rank, (_, section, fqn) in enumerate(rows) if section)
        rank, section, fqn = next(found, (0, 0, 0))
        self.not_finite = f"{sections[section - 1]} of {fqns[fqn]} on rank {rank}" if section else ""
        if any(row[0] for row in rows):
            return False
        if section:
            self._withhold()
            return False
        self.withheld = 0
        if not self.attached.verify():  # a checkpoint of replicas that differ would be nobody's
            state = snapshot.capture(self.attached, self.model)
        self.saved = write(
            self.folder / "checkpoints",
            step=self.attached.steps,
            state=state,
            place=self.place,
            shapes=self.engine.pieces.shapes,
            barrier=self.control.barrier,
            keep=self.config.train.keep_checkpoints,
            meta=self.account.record(),
            attempt=self.attempt,
            resumed_from=self.resumed_from,
        )
        self.clock.checkpoint_seconds = max(self.clock.checkpoint_seconds, time.monotonic() - started)
        return True

    def _withhold(self) -> None:
        self.withheld += 1
        if self.withheld > self.config.train.max_skipped_steps:
            raise NotFinite(
                f"step {self.attached.steps}: {self.not_finite} holds NaN or Inf, the step {self.withheld} in a row, "
                f"though none was skipped; {self._way_out()}"
            )

    def _way_out(self) -> str:
        """Which checkpoint there is to go back to, and what can be changed from there."""
        if self.saved is None:
            return "no checkpoint was written; lower the learning rate or look at the data"
        return (
            f"the last checkpoint, {self.saved}, is as it was; lower the learning rate or look at the data: a run with "
            f"other settings begins at its weights with run.weights={self.saved} and another run.dir"
        )

    def _finish(self, end: int, stop: int) -> Outcome:
        """The last checkpoint, the export and the summary; what is already there stays.

        Raises ``TooManySkippedSteps`` where the last steps before ``end`` were skipped, ``NotFinite`` for NaN in them.
        """
        step = self.attached.steps
        finished = step >= self.config.train.steps
        reason: Reason = "finished" if finished else ("stopped" if step == end else "signal")
        withheld = False
        if self.saved is None or step_of(self.saved) != step:
            if finished:
                self.attached.close_round()
            if step == end:
                self._evaluate()
            withheld = not self._checkpoint()
        if withheld and reason != "signal":
            raise self._ended_badly()
        skipped = max(int(row[0]) for row in self.control.rows([self.attached.skipped], "checkpoint"))
        outcome = Outcome(reason, step, stop if reason == "signal" else 0, withheld)
        if self.mesh.rank == 0:
            if reason != "signal":
                self._summarize(cast(Path, self.saved), skipped)
            said = {"reason": reason, "signal": outcome.signal or None, "step": step, "withheld": withheld}
            write_text_durably(self.folder / "outcome.json", strict_json.dumps(said))
        self.control.barrier()
        return outcome

    def _ended_badly(self) -> DtrainError:
        attached, settings = self.attached, self.config.train
        if self.not_finite:
            return NotFinite(
                f"step {attached.steps}, the last one: {self.not_finite} holds NaN or Inf; {self._way_out()}"
            )
        key = "train.steps" if attached.steps == settings.steps else "train.stop_after_steps"
        which = "all steps" if attached.skipped == attached.steps else "the last steps, on some rank"
        end = "" if attached.skipped == attached.steps else f"; or end at a step that is not skipped: {key}=..."
        return TooManySkippedSteps(
            f"step {attached.steps}, the last one: {which}, had no finite gradient or loss, so no checkpoint of it is "
            f"written; {self._way_out()}{end}"
        )

    def _summarize(self, path: Path, skipped: int) -> None:
        digest = export(path, self.folder / "export" / "model.safetensors")
        old = self.folder / "summary.json"
        if self.last_loss is None and old.exists():
            return  # nothing was left to do
        account, mesh = self.account, self.mesh
        parameters = sum(torch.Size(shape).numel() for shape in self.engine.pieces.shapes.values())
        Summary(
            run="/".join(self.folder.parts[-2:]),
            replicas=mesh.replicas,
            shards=mesh.shards,
            engine=self.config.engine.name,
            steps=self.attached.steps,
            seconds=account.seconds,
            skipped_steps=skipped,
            loss=self.last_loss,
            validation_loss=self.validation_loss,
            evaluated="anchor parameters" if "anchor" in self.attached.state.kinds else "parameters",
            tokens_per_second=account.tokens / account.seconds if account.seconds else None,
            sent_bytes_per_rank=account.sent_bytes,
            dense_bytes_per_rank=dense_bytes(parameters, mesh.replicas, mesh.shards) * self.attached.steps,
            compute_utilization=account.compute_utilization,
            exposed_fraction=account.exposed_fraction,
            parameters_digest=digest,
        ).write(old)

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.mesh.device, non_blocking=True) for name, tensor in batch.items()}

    def close(self) -> None:
        self.metrics.close()
        self.attached.detach()
        self.mesh.control.close()
        self.engine.close()
        self.mesh.close()


def dense_bytes(parameters: int, replicas: int, shards: int) -> int:
    """What one rank sends across the replicate axis for one dense fp32 gradient exchange.

    >>> dense_bytes(1000, replicas=2, shards=2)
    2000
    """
    return 2 * (replicas - 1) * 4 * (parameters // shards) // replicas
