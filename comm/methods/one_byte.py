"""One byte per replica and sample: each tries a direction that all can regenerate, and sends how the loss changes.

    replica m, sample k    l+- = loss(parameters +- eps z_mk);   g_mk = (l+ - l-) / (2 eps), as a byte
    all replicas           gather all bytes;   update the parameters by them, see `directions`

Zeroth-order gradients (SPSA), distributed as in "Just One Byte" (Zelikman et al., arXiv:2306.10015). Unlike in
its code, the replica that computed g uses only the byte of it, too, so forward passes may differ between replicas and
updates cannot. There are forward passes only, and no memory but the parameters and a second copy while directions are
tried: the copy is moved, so nothing has to be moved back.
Communication: one all-gather a step. Bytes: ``samples`` per replica. Keeps: counters; the log, if one is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtrain.comm.plans.plan import as_plan
from dtrain.comm.runtime.agreement import agreement_digest, gathered
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import ReplicasDiffer, groups_of, require_guard
from dtrain.comm.runtime.context import Context, description
from dtrain.comm.runtime.forward_only import ForwardSteps, require_plain_sgd
from dtrain.comm.runtime.membership.elastic import Elastic
from dtrain.comm.runtime.membership.elastic_machines import ElasticMachines
from dtrain.comm.runtime.membership.machines import Gathered, TakingPart
from dtrain.comm.runtime.method import Method, Sync
from dtrain.comm.shared_seed.byte_codec import encode
from dtrain.comm.shared_seed.digest import signed
from dtrain.comm.shared_seed.directions import At, Noise, Rule, Seeds, Step, Walk, walk_on
from dtrain.comm.shared_seed.update_log import Header, Record, UpdateLog
from dtrain.comm.state import Numbers

if TYPE_CHECKING:
    from dtrain.comm.pieces import Pieces
    from dtrain.comm.runtime.membership.members import Members


@dataclass(frozen=True)
class OneByte(Sync):
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
        context = self._context("one_byte", pieces, seed, None)
        context.begin(f"{self}")
        return Attached(context, OneByteSteps(self, context, Machines(self, context)))

    def bind_members(self, pieces: Pieces, seed: int, members: Members) -> Attached:
        """Raises ``ValueError`` without a log, from which newcomers catch up."""
        self.require_inner(pieces.optimizer)
        if not self.log:
            raise ValueError("newcomers catch up from the members' log; give one_byte(log=FOLDER)")
        membership = Elastic(pieces, members)
        context = self._context("one_byte, elastic", pieces, seed, membership)
        model = agreement_digest(context.description, "", pieces).hex()
        context.begin("", f"{str(self).partition(', log=')[0]}, seed={seed} ({model})")
        machines = ElasticMachines(self.walk(seed), self.log, context, membership)
        method = OneByteSteps(self, context, machines)
        machines.begin()
        return Attached(context, method)

    def walk(self, seed: int) -> Walk:
        """The directions of a run."""
        return Walk(seed % 2**64, self.samples, self.noise, self.seeds, self.rule, self.trimmed)

    def _context(self, name: str, pieces: Pieces, seed: int, membership: Elastic | None) -> Context:
        plan = as_plan(None)
        return Context(
            pieces, seed, description(name, plan, self), plan=plan, kinds={}, parameters_kind="replicated",
            membership=membership,
        )  # fmt: skip

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for another inner optimizer than plain SGD."""
        require_plain_sgd(optimizer, "one_byte")


class OneByteSteps(Method):
    """A `OneByte` at work. ``machines``: the replicas that take part, and their log."""

    counters = ("unusable",)

    def __init__(self, spec: OneByte, context: Context, machines: TakingPart) -> None:
        self.spec, self.context, self.machines = spec, context, machines
        self.walk = spec.walk(context.seed)
        self.forward = ForwardSteps(context, self.walk, spec.eps, self._at)
        self.samples = self.walk.samples
        self._step: Step | None = None  # the present one; None if the peers had made it already

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        return self.forward.estimate(loss)

    def prepare(self) -> bool:
        """Gather all replicas' bytes. False where none of them is usable."""
        codes = torch.tensor([encode(number) for number in self.forward.taken()], dtype=torch.uint8)
        gathered = self.machines.exchange(codes)
        self._step = None if gathered is None else self._step_of(gathered)
        return self._step is None or any(code & 0x7F for code in self._step.codes)

    def advance(self) -> None:
        """Make the step, and log it."""
        if self._step is not None:
            pieces, values = self.context.pieces, self.context.pieces.read()
            walk_on(values, pieces.segments, self.walk, self._step)
            self.machines.keep(Record(self._step, self.context.digest(values) if self.spec.log else 0))
            pieces.write(values)
        self.forward.stepped()

    def skip(self) -> None:
        """As `advance`: a step without usable bytes is logged, too, and applies weight decay."""
        self.advance()

    def after_step(self) -> None:
        period = self.spec.verify_every
        if self._step is not None and period and self.context.steps % period == 0:
            self.verify()

    def verify(self) -> bool:
        """Compare the digests of all replicas; True: they are equal. Every rank must call it.

        Raises `ReplicasDiffer` if they are not: a replica had another learning rate, or its arithmetic differs. Nothing
        is repaired: each replica's weights can be rebuilt from its log.
        """
        digest = torch.tensor([signed(self.context.digest())])
        digests = self.machines.gathered(digest, "verify")
        if digests is None:
            return True  # a replica was lost; the next step begins a new epoch
        most, *minorities = groups_of(digests.flatten().tolist())
        if minorities:
            rate = self.context.pieces.optimizer.param_groups[0]["lr"]
            differ = sorted(rank for group in minorities for rank in group)
            unknown = " (which are right cannot be known)" if len(most) == len(minorities[0]) else ""
            raise ReplicasDiffer(
                f"after step {self.context.steps - 1} replicas {differ} have other weights than {most}{unknown}: have "
                f"all the same learning rate (here {rate!r}) and decay at each step? If so, look at their memory and "
                "processors"
            )
        return True

    def numbers(self) -> Numbers:
        return {"unusable": self.forward.unusable}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.forward.unusable = int(numbers["unusable"])
        self.machines.go_on(self.context.digest() if self.spec.log else 0)

    def report(self) -> str:
        return self.forward.report()

    def detach(self) -> None:
        self.machines.detach()

    def _step_of(self, gathered: Gathered) -> Step:
        group = self.context.pieces.optimizer.param_groups[0]
        rate, decay = float(group["lr"]), float(group["weight_decay"])
        codes = bytes(gathered.codes.flatten().tolist())
        return Step(self.context.steps, gathered.epoch, gathered.workers, rate, decay, codes)

    def _at(self, sample: int) -> At:
        return self.context.steps, self.machines.number, sample


class Machines:
    """A fixed set of replicas; each writes its own log, if there is to be one."""

    def __init__(self, spec: OneByte, context: Context) -> None:
        self._context = context
        self.log: UpdateLog | None = None
        if spec.log:
            digest = context.digest()
            if not context.pieces.channel.places["shard"].rank:  # the first rank of a replica writes its log
                path = Path(spec.log) / f"replica-{self.number}.log"
                self.log = UpdateLog(path, Header(spec.walk(context.seed), dict(context.pieces.shapes), digest))

    @property
    def number(self) -> int:
        return self._context.place.rank

    def exchange(self, codes: Tensor) -> Gathered | None:
        all_codes = self._context.pieces.channel.run(gathered(codes), "bytes")
        return Gathered(all_codes, 0, tuple(range(self._context.place.size)))

    def gathered(self, value: Tensor, label: str) -> Tensor | None:
        return self._context.pieces.channel.run(gathered(value), label)

    def keep(self, record: Record) -> None:
        if self.log is not None:
            self.log.append(record)

    def go_on(self, digest: int) -> None:
        if self.log is not None:
            self.log.go_on(self._context.steps, digest)

    def detach(self) -> None:
        if self.log is not None:
            self.log.close()


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
    """Zeroth-order steps that cost one byte per replica and sample.

    Args:
        eps: the step along a direction in the finite difference; an element moves by eps. 1e-3 for fp32.
        samples: directions that each replica tries in a step.
        noise: "signs", or "normal" numbers.
        seeds: "per_worker": the variance falls with the number of replicas; or "common": all try the same direction.
        rule: how numbers along a common direction are combined: "mean", "median", "trimmed_mean" or "majority".
        trimmed: how many of the largest and of the smallest numbers "trimmed_mean" leaves out.
        log: a folder in which each replica writes its `update_log`, replica-N.log; empty: none.
        verify_every: steps between two comparisons of all replicas' weights, by digests of 8 bytes; 0: never.

    >>> one_byte(samples=4).samples
    4

    Raises ``ValueError`` for numbers outside their range and for rules that need common directions.
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}; give a small positive number such as 1e-3")
    Walk(0, samples, noise, seeds, rule, trimmed)  # raises for invalid settings
    require_guard(verify_every, "stop", "steps")
    return OneByte(eps, samples, noise, seeds, rule, trimmed, log, verify_every)
