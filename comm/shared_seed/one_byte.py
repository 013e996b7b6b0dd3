"""One byte per machine and sample: each tries a direction that all can make again, and tells how the loss changes.

    own sample k      l+- = loss(parameters +- eps z_mk);   g_mk = (l+ - l-) / (2 eps), as a byte
    everybody         all bytes are gathered;   parameters <- what `directions` makes of them

Zeroth-order gradients (SPSA), distributed as in "Just One Byte" (Zelikman et al., arXiv:2306.09927), with what its code
left out: the byte is all that anybody uses of g, the machine that found it included, so forward passes may differ from
machine to machine and updates cannot. Forward passes only; nothing is kept but the parameters, of which a second copy
exists while directions are tried: what is moved is the copy, so nothing has to be moved back.
Communication: one all-gather a step. Bytes: ``samples`` of each machine. Keeps: counters; the log, if one is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dtrain.comm.layout import Named
from dtrain.comm.ops import AllGather, Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.base import as_plan
from dtrain.comm.schedules.sync import Attached
from dtrain.comm.shared_seed.code import encode
from dtrain.comm.shared_seed.digest import partial, unsigned
from dtrain.comm.shared_seed.directions import Noise, Rule, Seeds, Step, Walk, both_ways, walk_on
from dtrain.comm.shared_seed.philox import Address
from dtrain.comm.shared_seed.update_log import Header, Record, UpdateLog
from dtrain.comm.state import Kind, State


@dataclass(frozen=True)
class OneByte:
    """See `one_byte`."""

    eps: float
    samples: int
    noise: Noise
    seeds: Seeds
    rule: Rule
    trimmed: int
    log: str

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        inner = pieces.optimizer
        if not isinstance(inner, torch.optim.SGD) or any(group["momentum"] for group in inner.param_groups):
            raise ValueError(
                "one_byte takes its steps itself and reads rate and decay from the optimizer; give it "
                f"torch.optim.SGD(lr=..., weight_decay=...) without momentum, not {type(inner).__name__}"
            )
        if len({(group["lr"], group["weight_decay"]) for group in inner.param_groups}) > 1:
            raise ValueError("one_byte has one learning rate and one weight decay; make one parameter group")
        return AttachedOneByte(self, pieces, seed)


@dataclass
class _Trial:
    """What was found since the last step."""

    losses: list[float] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)


class AttachedOneByte(Attached):
    """A `OneByte` at work. `estimate` stands where ``backward()`` was."""

    parameters_kind: Kind = "replicated"
    counters = (*Attached.counters, "unusable")

    def __init__(self, spec: OneByte, pieces: Pieces, seed: int) -> None:
        super().__init__(pieces, State({}), as_plan(None), seed, spec)
        self.spec = spec
        self.walk = Walk(seed % 2**64, spec.samples, spec.noise, spec.seeds, spec.rule, spec.trimmed)
        self.unusable = 0
        self._trial = _Trial()
        self._checked = False
        pieces.hand_over(None)
        self.log = self._opened() if spec.log else None

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        """Try the next direction on ``loss()``, which runs the model forward on this rank's batch; the mean loss.

        Call it ``samples`` times before `step`. It is called with the model moved one way and the other, without
        gradients, and must give the same for the same parameters: the batch stays, and dropout draws the same again.
        Every rank must call it.

        Raises ``RuntimeError`` if it does not, and for more samples than there are.
        """
        sample, eps = len(self._trial.codes), self.spec.eps
        if sample == self.spec.samples:
            raise RuntimeError(f"all {sample} directions of this step were tried; call step() before the next one")
        base, segments = self.pieces.read(), self.pieces.segments
        at = (self.steps, self.pieces.place.rank, sample)
        try:
            if not self._checked:
                self._require_repeatable(loss)
                self._checked = True
            found = []
            for values in both_ways(base, segments, self.walk, at, eps):
                self.pieces.write(values)
                found.append(self._loss(loss))
        finally:
            self.pieces.write(base)
        number = (found[0] - found[1]) / (2 * eps)
        if not math.isfinite(number):
            self.unusable += 1
        self._trial.codes.append(encode(number))
        self._trial.losses.append((found[0] + found[1]) / 2)
        return self._trial.losses[-1]

    def step(self) -> bool:
        """Gather everybody's bytes, log them, and step. False where nobody had anything usable."""
        if len(self._trial.codes) != self.spec.samples:
            raise RuntimeError(
                f"{len(self._trial.codes)} of {self.spec.samples} directions were tried since the last step; call "
                "estimate(...) for each"
            )
        mine, self._trial = torch.tensor(self._trial.codes, dtype=torch.uint8), _Trial()
        everybody = self.pieces.channel.run(_gathered(mine), "bytes")
        group = self.pieces.optimizer.param_groups[0]
        codes = bytes(everybody.flatten().tolist())
        step = Step(
            self.steps, 0, tuple(range(self.pieces.place.size)), float(group["lr"]), float(group["weight_decay"]), codes
        )
        ok = any(code & 0x7F for code in codes)
        values = self.pieces.read()
        walk_on(values, self.pieces.segments, self.walk, step)
        digest = self._digest(values) if self.spec.log else 0
        if self.log is not None:
            self.log.append(Record(step, digest))
        self.pieces.write(values)
        self.skipped_in_a_row = 0 if ok else self.skipped_in_a_row + 1
        self.skipped += not ok
        self.steps += 1
        return ok

    def digest(self) -> int:
        """Of every element of the parameters, the same for every sharding. Every rank must call it."""
        return self._digest(self.pieces.read())

    def detach(self) -> None:
        if self.log is not None:
            self.log.close()
        super().detach()

    def load_integers(self, integers: Mapping[str, int]) -> None:
        super().load_integers(integers)
        if self.log is not None:
            self.log.cut(self.steps)

    def _opened(self) -> UpdateLog | None:
        """This replica's log, for the first of its ranks."""
        header = Header(self.walk, dict(self.pieces.shapes), self.digest())
        if self.pieces.channel.places["shard"].rank:
            return None
        return UpdateLog(Path(self.spec.log) / f"replica-{self.pieces.place.rank}.log", header)

    def _digest(self, values: Named) -> int:
        return unsigned(self._over_shards(partial(values, self.pieces.segments), "digest"))

    def _loss(self, loss: Callable[[], Tensor]) -> float:
        """The mean over this replica's ranks; random numbers that it draws are the same each time, others each step."""
        worker, sample = self.pieces.channel.places["shard"].rank, len(self._trial.codes)
        at = Address("forward", self.steps, self.pieces.place.rank, sample)
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(at.stream(str(worker)) >> 1)
            value = loss().detach().double().reshape(1)
        return float(self._over_shards(value, "loss")) / self.pieces.channel.places["shard"].size

    def _require_repeatable(self, loss: Callable[[], Tensor]) -> None:
        once, again = self._loss(loss), self._loss(loss)
        if once != again and not (math.isnan(once) and math.isnan(again)):
            raise RuntimeError(
                f"the loss is {once!r}, and with the same parameters {again!r}: take the batch before estimate(...), "
                "and put layers that change in forward (BatchNorm) into eval()"
            )

    def _gradients_ok(self) -> bool:
        return True

    def _after_step(self) -> None:
        pass


def one_byte(
    *,
    eps: float = 1e-3,
    samples: int = 1,
    noise: Noise = "signs",
    seeds: Seeds = "per_worker",
    rule: Rule = "mean",
    trimmed: int = 1,
    log: str = "",
) -> OneByte:
    """Zeroth-order steps that cost one byte per machine and sample.

    Args:
        eps: how far a direction is tried; an element moves by eps. 1e-3 for fp32.
        samples: directions that each machine tries in a step.
        noise: "signs", or "normal" numbers.
        seeds: "per_worker": the variance falls with the number of machines; or "common": all try the same direction.
        rule: how numbers along a common direction become one: "mean", "median", "trimmed_mean" or "majority".
        trimmed: of "trimmed_mean", how many of the largest and of the smallest are left out.
        log: a folder for the run's `update_log`, of which each replica writes one, replica-N.log; empty: none.

    >>> one_byte(samples=4).samples
    4

    Raises ``ValueError`` for numbers outside their range and rules that need common directions.
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}; give a small positive number such as 1e-3")
    Walk(0, samples, noise, seeds, rule, trimmed)  # refuses what makes no sense
    return OneByte(eps, samples, noise, seeds, rule, trimmed, log)


def _gathered(mine: Tensor) -> Flow[Tensor]:
    (everybody,) = yield AllGather((mine,))
    return everybody
