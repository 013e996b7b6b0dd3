"""One byte per machine and sample: each tries a direction that all can make again, and tells how the loss changes.

    own sample k      l+- = loss(parameters +- eps z_mk);   g_mk = (l+ - l-) / (2 eps), as a byte
    everybody         all bytes are gathered;   parameters <- what `directions` makes of them

Zeroth-order gradients (SPSA), distributed as in "Just One Byte" (Zelikman et al., arXiv:2306.10015), with what its code
left out: the byte is all that anybody uses of g, the machine that found it included, so forward passes may differ from
machine to machine and updates cannot. Forward passes only; nothing is kept but the parameters, of which a second copy
exists while directions are tried: what is moved is the copy, so nothing has to be moved back.
Communication: one all-gather a step. Bytes: ``samples`` of each machine. Keeps: counters; the log, if one is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import ReplicasDiffer, groups_of, require_guard
from dtrain.comm.runtime.forward_only import ForwardOnly, require_plain_sgd
from dtrain.comm.shared_seed.byte_codec import encode
from dtrain.comm.shared_seed.digest import signed
from dtrain.comm.shared_seed.directions import At, Noise, Rule, Seeds, Step, Walk, walk_on
from dtrain.comm.shared_seed.update_log import Header, Record, UpdateLog
from dtrain.comm.state import Kind


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
    verify_every: int

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        self.require_inner(pieces.optimizer)
        return AttachedOneByte(self, pieces, seed)

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for an inner optimizer that does not go with it."""
        require_plain_sgd(optimizer, "one_byte")


class AttachedOneByte(ForwardOnly):
    """A `OneByte` at work."""

    parameters_kind: Kind = "replicated"

    def __init__(self, spec: OneByte, pieces: Pieces, seed: int) -> None:
        walk = Walk(seed % 2**64, spec.samples, spec.noise, spec.seeds, spec.rule, spec.trimmed)
        super().__init__(spec, pieces, seed, walk, spec.eps, {})
        self.spec = spec
        self.log = self._opened() if spec.log else None

    def step(self) -> bool:
        """Gather everybody's bytes, log them, and step. False where nobody had anything usable."""
        everybody = self.pieces.channel.run(gathered(self._mine()), "bytes")
        return self._take(self._step_of(everybody, 0, tuple(range(self.pieces.place.size))))

    def detach(self) -> None:
        if self.log is not None:
            self.log.close()
        super().detach()

    def load_integers(self, integers: Mapping[str, int]) -> None:
        super().load_integers(integers)
        start = self.digest() if self.spec.log else 0
        if self.log is not None:
            self.log.go_on(self.steps, start)

    def _mine(self) -> Tensor:
        """What was found since the last step, [samples] bytes."""
        return torch.tensor([encode(number) for number in self._taken()], dtype=torch.uint8)

    def _step_of(self, everybody: Tensor, epoch: int, workers: tuple[int, ...]) -> Step:
        group = self.pieces.optimizer.param_groups[0]
        rate, decay = float(group["lr"]), float(group["weight_decay"])
        return Step(self.steps, epoch, workers, rate, decay, bytes(everybody.flatten().tolist()))

    def _take(self, step: Step) -> bool:
        """Log it, then go it."""
        values = self.pieces.read()
        walk_on(values, self.pieces.segments, self.walk, step)
        self._keep(Record(step, self._digest(values) if self.spec.log else 0))
        self.pieces.write(values)
        ok = self._count(any(code & 0x7F for code in step.codes))
        if self.spec.verify_every and self.steps % self.spec.verify_every == 0:
            self.verify()
        return ok

    def verify(self) -> bool:
        """Compare the digests of all machines; True: they are equal. Every rank must call it.

        Raises `ReplicasDiffer` if they are not: somebody had another learning rate, or computes something else. Nothing
        is repaired: each machine's log says what its weights were.
        """
        digests = self.pieces.channel.run(gathered(torch.tensor([signed(self.digest())])), "verify").flatten().tolist()
        most, *others = groups_of(digests)
        if others:
            rate = self.pieces.optimizer.param_groups[0]["lr"]
            differ = sorted(rank for group in others for rank in group)
            unknown = " (which are right cannot be known)" if len(most) == len(others[0]) else ""
            raise ReplicasDiffer(
                f"after step {self.steps - 1} machines {differ} have other weights than {most}{unknown}: have all the "
                f"same learning rate (here {rate!r}) and decay at each step? If so, look at their memory and processors"
            )
        return True

    def _keep(self, record: Record) -> None:
        if self.log is not None:
            self.log.append(record)

    def _opened(self) -> UpdateLog | None:
        """This replica's log, for the first of its ranks."""
        header = Header(self.walk, dict(self.pieces.shapes), self.digest())
        if self.pieces.channel.places["shard"].rank:
            return None
        return UpdateLog(Path(self.spec.log) / f"replica-{self.pieces.place.rank}.log", header)

    def _at(self, sample: int) -> At:
        return self.steps, self.pieces.place.rank, sample


def one_byte(
    *,
    eps: float = 1e-3,
    samples: int = 1,
    noise: Noise = "signs",
    seeds: Seeds = "per_worker",
    rule: Rule = "mean",
    trimmed: int = 1,
    log: str = "",
    verify_every: int = 100,
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
        verify_every: steps between two comparisons of all machines' weights, by digests of 8 bytes; 0: never.

    >>> one_byte(samples=4).samples
    4

    Raises ``ValueError`` for numbers outside their range and rules that need common directions.
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}; give a small positive number such as 1e-3")
    Walk(0, samples, noise, seeds, rule, trimmed)  # refuses what makes no sense
    require_guard(verify_every, "stop", "steps")
    return OneByte(eps, samples, noise, seeds, rule, trimmed, log, verify_every)


def gathered(mine: Tensor) -> Flow[Tensor]:
    """``mine`` of everybody, [world, ...]."""
    (everybody,) = yield AllGather((mine,))
    return everybody
