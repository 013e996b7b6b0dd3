"""FedKSeed: the model is its initial weights and K numbers, one along each of K fixed directions.

    round     each replica, from the same weights, tau steps:   draw s of K;   g = SPSA along z_s;   w <- w - lr g z_s
    then      all (s, g) are gathered;   A_s <- A_s + sum over replicas i of share_i g      (share: of the tokens)
              w <- w_0 - lr sum over s of A_s z_s                                           rebuilt in order of s

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes", arXiv:2312.06353. Here there is no server: every replica adds up A and rebuilds the weights, bitwise equal
on all. The weights stay within K dimensions around w_0: more steps need no more bytes, and K bounds what is learned.
Sampling "pro" prefers directions along which the loss has changed more.
Communication: one all-gather a round. Bytes: 8 for each of its steps, and 4. Keeps: w_0, A; "pro": two numbers per s.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from dtrain.comm.layout import Named
from dtrain.comm.ops import AllGather, Flow, Payload
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.plan import as_plan
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import Held, Tie, require_guard
from dtrain.comm.runtime.context import Context, description
from dtrain.comm.runtime.forward_only import ForwardSteps, require_plain_sgd
from dtrain.comm.runtime.guard import Guard, parameters_held, state_held
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS
from dtrain.comm.runtime.method import Method, Sync
from dtrain.comm.shared_seed.directions import Noise, Walk, move, single
from dtrain.comm.shared_seed.philox import Address
from dtrain.comm.state import Numbers

Sampling: TypeAlias = Literal["uniform", "pro"]
LARGEST = 1000.0
"""The largest absolute value that a number counts for "pro"."""


@dataclass(frozen=True)
class FedKSeed(Sync):
    """See `fedkseed`."""

    every_steps: int
    directions: int
    eps: float
    noise: Noise
    sampling: Sampling
    verify_every: int = VERIFY_ROUNDS
    tie: Tie = "stop"

    constant_rate: ClassVar[bool] = True

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        self.require_inner(pieces.optimizer)
        plan = as_plan(None)
        context = Context(
            pieces, seed, description("fedkseed", plan, self), plan=plan, kinds={"first": "replicated"},
            parameters_kind="per_worker",
        )  # fmt: skip
        context.begin(f"{(self, context.rate)}")
        return Attached(context, FedKSeedRounds(self, context))

    def require_inner(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for another inner optimizer than plain SGD, and for weight decay."""
        require_plain_sgd(optimizer, "fedkseed")
        decay = max(group["weight_decay"] for group in optimizer.param_groups)
        if decay:
            raise ValueError(
                f"fedkseed rebuilds the weights from the first ones and a sum along {self.directions} directions, "
                f"which cannot express weight decay ({decay}); set it to 0: optim.inner.weight_decay=0"
            )


class FedKSeedRounds(Method):
    """A `FedKSeed` at work. Within a round the replicas' weights differ.

    ``sums``: the number along each direction, of all rounds. ``open``: direction and number of this round's steps.
    """

    samples = 1
    counters = ("unusable", "rounds", "tokens")
    always = ("first",)

    def __init__(self, spec: FedKSeed, context: Context) -> None:
        self.spec, self.context, self.rate = spec, context, context.rate
        self.walk = Walk(context.seed % 2**64, noise=spec.noise)
        self.forward = ForwardSteps(context, self.walk, spec.eps, lambda sample: (0, 0, self.chosen()))
        means = "first weights, sums along directions; after a round the weights"
        self._guard = Guard(context, spec.tie, means, self._held, words=lambda: f"{self.sums}")
        self.rounds = self.tokens = 0
        self.sums = [0.0] * spec.directions  # A
        self.seen = [(0.0, 1)] * spec.directions  # for "pro": sum and count of absolute values, from one 0
        self.open: list[tuple[int, float]] = []
        self._borders: list[float] = []  # cumulative sums of the odds, which change with the round
        self._drawn = -1, 0  # a step and its direction
        for fqn, value in context.pieces.read().items():
            context.state.stage(fqn, "first", value)
        context.state.commit()

    def weigh(self, tokens: int) -> None:
        """Set, before `step`, how many tokens this replica's step was made from; without it a step counts as one."""
        self.tokens += tokens - 1

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        return self.forward.estimate(loss)

    def prepare(self) -> bool:
        """Whether this replica's estimate is usable. Replicas may differ."""
        if self.context.rate != self.rate:
            raise RuntimeError(
                f"the learning rate was {self.rate!r} and is {self.context.rate!r}; fedkseed makes the weights from "
                "sums over all steps, so it must be constant (optim.schedule=constant optim.warmup_steps=0)"
            )
        (number,), chosen = self.forward.taken(), self.chosen()
        usable = math.isfinite(single(self.rate * number))
        self.open.append((chosen, single(number) if usable else 0.0))
        self._along = single(-self.rate * number) if usable else 0.0
        return usable

    def advance(self) -> None:
        pieces, values = self.context.pieces, self.context.pieces.read()
        move(values, pieces.segments, self.walk, [((0, 0, self.chosen()), self._along)])
        pieces.write(values)
        self.forward.stepped()

    def skip(self) -> None:
        self.forward.stepped()

    def after_step(self) -> None:
        """At the end of a round gather, and rebuild the weights."""
        self.tokens += 1
        if len(self.open) == self.spec.every_steps:
            self._end_round()
            if self.spec.verify_every and self.rounds % self.spec.verify_every == 0:
                self.verify()

    def verify(self) -> bool:
        return self._guard.verify()

    @property
    def in_round(self) -> bool:
        return bool(self.open)

    def close_round(self) -> bool:
        open_round = bool(self.open)
        if open_round:
            self._end_round()
        return open_round

    def _held(self) -> Held:
        yield from state_held(self.context)
        if self.rounds and not self.open:
            yield from parameters_held(self.context)

    def to_evaluate(self) -> dict[str, Tensor] | None:
        return dict(self._made()) if self.open else None

    def numbers(self) -> Numbers:
        numbers: Numbers = {"unusable": self.forward.unusable, "rounds": self.rounds, "tokens": self.tokens}
        numbers["rate"] = float(self.rate)
        numbers |= {f"sum.{s}": number for s, number in enumerate(self.sums) if number}
        for s, (amount, times) in enumerate(self.seen):
            if times > 1:
                numbers |= {f"seen.{s}": amount, f"times.{s}": times}
        for place, (s, number) in enumerate(self.open):
            numbers |= {f"own.{place}": s, f"own.{place}.number": number}
        return numbers

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.forward.unusable, self.rounds = int(numbers["unusable"]), int(numbers["rounds"])
        self.tokens = int(numbers["tokens"])
        self._borders, self._drawn = [], (-1, 0)
        if numbers["rate"] != self.rate:
            raise ValueError(
                f"this run had the learning rate {numbers['rate']!r}, by which all its sums are scaled; "
                f"resume with it instead of {self.rate!r}"
            )
        directions = range(self.spec.directions)
        self.sums = [float(numbers.get(f"sum.{s}", 0.0)) for s in directions]
        self.seen = [(float(numbers.get(f"seen.{s}", 0.0)), _whole(numbers, f"times.{s}", 1)) for s in directions]
        self.open = [
            (_whole(numbers, f"own.{place}"), float(numbers[f"own.{place}.number"]))
            for place in itertools.takewhile(lambda place: f"own.{place}" in numbers, itertools.count())
        ]

    def chosen(self) -> int:
        """The direction that this replica tries in this step."""
        step, chosen = self._drawn
        if step != self.context.steps:
            chosen = self._draw(self.walk.random.uniform(Address("seed", self.context.steps, self.context.place.rank)))
            self._drawn = self.context.steps, chosen
        return chosen

    def _draw(self, number: float) -> int:
        if self.spec.sampling == "uniform":
            return int(number * self.spec.directions)
        if not self._borders:
            self._borders = list(itertools.accumulate(odds([amount / times for amount, times in self.seen])))
        return min(bisect.bisect_right(self._borders, number * self._borders[-1]), self.spec.directions - 1)

    def _end_round(self) -> None:
        missing = self.spec.every_steps - len(self.open)
        seeds, numbers = zip(*self.open, *[(0, 0.0)] * missing, strict=True)
        payload = (
            torch.tensor(seeds, dtype=torch.int32),
            torch.tensor(numbers, dtype=torch.float32),
            torch.tensor([float(self.tokens)]),
        )
        all_seeds, all_numbers, tokens = self.context.pieces.channel.run(_gathered(payload), "round")
        total = float(tokens.double().sum())
        for worker in range(self.context.place.size):
            share = float(tokens[worker]) / total
            for s, number in zip(all_seeds[worker].tolist(), all_numbers[worker].tolist(), strict=True):
                self.sums[s] += share * number
                if number:
                    amount, times = self.seen[s]
                    self.seen[s] = amount + min(abs(number), LARGEST), times + 1
        self.context.pieces.write(self._made())
        self.open, self.tokens, self._borders = [], 0, []
        self.rounds += 1

    def _made(self) -> Named:
        """The weights that all replicas agree on."""
        values = {fqn: self.context.state.tensors[fqn]["first"].clone() for fqn in self.context.pieces.segments}
        moves = (((0, 0, s), single(-self.rate * number)) for s, number in enumerate(self.sums))
        move(values, self.context.pieces.segments, self.walk, moves)
        return values

    def report(self) -> str:
        return self.forward.report()


def _whole(numbers: Mapping[str, float], name: str, default: int | None = None) -> int:
    value = numbers[name] if default is None else numbers.get(name, default)
    if not isinstance(value, int):
        raise ValueError(f"{name} of the state to load is {value!r}; it is an integer")
    return value


def fedkseed(
    *,
    every_steps: int = 200,
    directions: int = 4096,
    eps: float = 5e-4,
    noise: Noise = "signs",
    sampling: Sampling = "uniform",
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> FedKSeed:
    """Zeroth-order rounds along fixed directions; a few kilobytes per round for a model of any size.

    Args:
        every_steps: tau, steps in a round.
        directions: K. What is learned lies in their span; the time to rebuild the weights is proportional to K.
        eps: the step along a direction in the finite difference.
        noise: "signs", or "normal" numbers.
        sampling: "uniform", or "pro": in proportion to exp of the mean absolute number of a direction, scaled to [0, 1]
            over all of them.
        verify_every: rounds between two comparisons of the replicas' rebuilt weights; 0 for none.
        tie: see `every_step`.

    >>> fedkseed().directions
    4096

    Raises ``ValueError`` for numbers outside their range, and when attached to an optimizer with momentum or decay.
    """
    for name, value in (("every_steps", every_steps), ("directions", directions)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a positive whole number")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}; give a small positive number such as 5e-4")
    if sampling not in ("uniform", "pro"):
        raise ValueError(f"sampling is {sampling!r}; choose 'uniform' or 'pro'")
    Walk(0, noise=noise)  # raises for invalid settings
    require_guard(verify_every, tie, "rounds")
    return FedKSeed(every_steps, directions, eps, noise, sampling, verify_every, tie)


def odds(amounts: list[float]) -> list[float]:
    """The probability of each direction, up to a factor: exp of its amount, scaled to [0, 1].

    >>> [round(factor, 3) for factor in odds([0.0, 3.0, 6.0])]
    [1.0, 1.649, 2.718]
    """
    least, most = min(amounts), max(amounts)
    return [math.exp((amount - least) / (most - least + 1e-10)) for amount in amounts]


def _gathered(payload: Payload) -> Flow[tuple[Tensor, ...]]:
    gathered = yield AllGather(payload)
    return tuple(gathered)
