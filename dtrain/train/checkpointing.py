"""A run's checkpoints: which one it resumes from, when one may be written, and what to do if none can.

None is written while steps are being skipped, or of a state that is not finite: as older ones are deleted, it would
soon be all that is left.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import DtrainError, NotFinite, TooManySkippedSteps
from dtrain.train import model_snapshot as snapshot
from dtrain.train import rng
from dtrain.train.checkpoint import Placement, load, read_manifest, write
from dtrain.train.checkpoint.finite import first_not_finite
from dtrain.train.checkpoint.folders import step_of
from dtrain.train.checkpoint.state import OPAQUE
from dtrain.train.checkpoint_choice import find_checkpoint, own_checkpoint

if TYPE_CHECKING:
    from dtrain.train.checkpoint.state import RankState
    from dtrain.train.config import Config
    from dtrain.train.mesh import Mesh
    from dtrain.train.setup import Parts
    from dtrain.train.totals import Account
    from dtrain.train.votes import Control


class Checkpoints:
    """``damaged``: those that could not be resumed from, and why. ``saved``: the newest of this run. ``seconds``: the
    longest that one took.

    ``attempt``: differs between processes that may write into the same run folder one after the other.
    """

    def __init__(
        self, config: Config, mesh: Mesh, parts: Parts, account: Account, control: Control, attempt: str
    ) -> None:
        self._config, self._mesh, self._parts = config, mesh, parts
        self._account, self._control, self._attempt = account, control, attempt
        self._attached, self._pieces = parts.attached, parts.engine.pieces
        self._folder = Path(config.run.dir)
        self._place = Placement(replica=mesh.replica, replicas=mesh.replicas, shard=mesh.shard, shards=mesh.shards)
        self._not_finite, self._withheld = "", 0  # why one could not be written, and how often in a row
        self.damaged: list[str] = []
        self.seconds = 0.0
        self.resumed_from = self._resume()
        self.saved = self.resumed_from if own_checkpoint(self.resumed_from, self._folder) else None

    def _resume(self) -> Path | None:
        """From the newest checkpoint, if there is one: parameters, state, generators and accounts."""
        seed, rank = self._config.train.seed, self._mesh.rank
        path = find_checkpoint(self._config, self.damaged.append)
        if path is None:
            rng.seed_everything(seed, rank)
            return None
        segments, shapes = snapshot.wanted(self._pieces), self._pieces.shapes
        state = load(path, place=self._place, segments=segments, shapes=shapes)
        snapshot.put_back(state, self._attached, self._parts.model)
        if state.rng:
            rng.restore(state.rng)
        else:  # another number of ranks: each starts a stream of its own, declared by the checkpoint as translated
            rng.seed_everything(seed, rank, self._attached.steps)
        self._account.restore(read_manifest(path).meta)
        if rank == 0:
            print(f"resumed from {path}", *(f"  {name}: {how}" for name, how in state.translated.items()), sep="\n")
        return path

    @property
    def written_at(self) -> int | None:
        """The step of the newest checkpoint of this run."""
        return None if self.saved is None else step_of(self.saved)

    def write(self) -> bool:
        """Write one, unless steps are being skipped or a rank's state is not finite; whether it was. Collective.

        Raises ``NotFinite`` for a state that does not become finite although no step is skipped.
        """
        started = time.monotonic()
        state = self._captured()
        skipping, self._not_finite = self._agreed(state)
        if skipping:
            return False
        if self._not_finite:
            self._withhold()
            return False
        self._withheld = 0
        if not self._attached.verify():  # a checkpoint of replicas that differ would be nobody's
            state = self._captured()
        self.saved = write(
            self._folder / "checkpoints",
            step=self._attached.steps,
            state=state,
            place=self._place,
            shapes=self._pieces.shapes,
            barrier=self._control.barrier,
            keep=self._config.train.keep_checkpoints,
            meta=self._account.record(),
            attempt=self._attempt,
            resumed_from=self.resumed_from,
        )
        self.seconds = max(self.seconds, time.monotonic() - started)
        return True

    def _captured(self) -> RankState:
        return snapshot.capture(self._attached, self._parts.model)

    def _agreed(self, state: RankState) -> tuple[bool, str]:
        """Whether some rank skips steps, and which tensor of which rank is not finite; the same on all ranks."""
        # All ranks have the same sections and parameters, so that two numbers say which of them it is.
        sections, fqns = [*sorted(state.kinds), OPAQUE], sorted(self._pieces.shapes)
        bad = first_not_finite(state)
        numbers = [sections.index(bad[0]) + 1, fqns.index(bad[1].rpartition(" of ")[2])] if bad else [0, 0]
        rows = self._control.rows([self._attached.skipped_in_a_row, *numbers], "checkpoint")
        first = ((rank, int(section), int(fqn)) for rank, (_, section, fqn) in enumerate(rows) if section)
        rank, section, fqn = next(first, (0, 0, 0))
        tensor = f"{sections[section - 1]} of {fqns[fqn]} on rank {rank}" if section else ""
        return any(row[0] for row in rows), tensor

    def _withhold(self) -> None:
        self._withheld += 1
        if self._withheld > self._config.train.max_skipped_steps:
            raise NotFinite(
                f"step {self._attached.steps}: {self._not_finite} holds NaN or Inf, the step {self._withheld} in a "
                f"row, though none was skipped; {self.way_out()}"
            )

    def way_out(self) -> str:
        """Which checkpoint there is to go back to, and what can be changed from there."""
        if self.saved is None:
            return "no checkpoint was written; lower the learning rate or look at the data"
        return (
            f"the last checkpoint, {self.saved}, is as it was; lower the learning rate or look at the data: a run with "
            f"other settings begins at its weights with run.weights={self.saved} and another run.dir"
        )

    def none_at_the_end(self) -> DtrainError:
        """Why the last step has no checkpoint."""
        attached, settings = self._attached, self._config.train
        if self._not_finite:
            return NotFinite(
                f"step {attached.steps}, the last one: {self._not_finite} holds NaN or Inf; {self.way_out()}"
            )
        key = "train.steps" if attached.steps == settings.steps else "train.stop_after_steps"
        which = "all steps" if attached.skipped == attached.steps else "the last steps, on some rank"
        end = "" if attached.skipped == attached.steps else f"; or end at a step that is not skipped: {key}=..."
        return TooManySkippedSteps(
            f"step {attached.steps}, the last one: {which}, had no finite gradient or loss, so no checkpoint of it is "
            f"written; {self.way_out()}{end}"
        )
