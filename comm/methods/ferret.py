"""Ferret: local steps by gradients; a round sends the pseudo-gradient's projections on fresh random directions.

    each replica i     delta_i in blocks of b elements;   K_il directions for block l, allotted for the least error
                       V_il: b x K_il signs from (run, round, replica, block);   gamma_il = V_il^T delta_il / K_il
    all replicas       D_l = a_l sum over i of share_i V_il gamma_il;   then the outer step
                       a_l = K_l / (K_l + b - 1), K_l = sum over i of K_il;   or 1, unbiased (``shrink="none"``)

Source: Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", arXiv:2409.06277. This
follows the paper where its code departs from it: the factor 1 / K once, not a third of it; fresh directions per replica
and round, so that projection errors average out over both; directions follow from the seed and are not communicated.
K_il in proportion to sqrt(b) |delta_il| has the least error for signs; with equal blocks it is the paper's allocation.
Numbers are sent as 8-bit integers with one scale: their rounding error is far below that of the projection, and sums of
signs times integers are exact, so that matrix products on all processors agree bitwise.
Cosine and relative norm of one replica's decoded delta (a = 1): sqrt(K / (K + d)) and sqrt((K + d) / K) for d elements:
a weak estimate, unless rounds are many.
Communication: one all-gather a round. Bytes: ``directions``, one for each block, and 8.
Keeps: what a local update keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from dtrain.comm.collectives.two_phase import Combined, all_finite
from dtrain.comm.compressors.projection import shrinkage
from dtrain.comm.layout import Named
from dtrain.comm.methods.local_update import local_update
from dtrain.comm.ops import AllGather, Flow, Place
from dtrain.comm.outer_optimizers import OuterOptimizer, Round, sgd
from dtrain.comm.runtime.consistency import Tie
from dtrain.comm.runtime.local_updates import at_work
from dtrain.comm.runtime.loop_spec import VERIFY_ROUNDS, LoopSpec
from dtrain.comm.runtime.method import Sync
from dtrain.comm.shared_seed.directions import single
from dtrain.comm.shared_seed.philox import Address, SharedRandom

if TYPE_CHECKING:
    from dtrain.comm.pieces import Pieces
    from dtrain.comm.runtime.attached import Attached
    from dtrain.comm.runtime.context import Context
    from dtrain.comm.runtime.loop import Parts
    from dtrain.comm.runtime.membership.members import Members
    from dtrain.comm.runtime.rounds import Fragment, Reduction

Shrink: TypeAlias = Literal["least_error", "none"]
LEAST, MOST = 1, 255
"""Bounds of a block's number of directions, which is sent as one byte."""
LARGEST = 127


@dataclass(frozen=True)
class Ferret(LoopSpec, Sync):
    """See `ferret`."""

    directions: int = 8192
    block: int = 16384
    shrink: Shrink = "least_error"

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        budget = self.budget(pieces)

        def project(context: Context, parts: Parts) -> None:
            parts.reduce = Projections(self, context, budget)

        return at_work(self, pieces, seed, name="ferret", settings=("directions", "block", "shrink"), change=project)

    def bind_members(self, pieces: Pieces, seed: int, members: Members) -> Attached:
        raise ValueError(
            "replicas cannot come and go with ferret: the directions of a round belong to a replica's number; take "
            "diloco(...)"
        )

    def budget(self, pieces: Pieces) -> int:
        """The number of directions of this rank, by its share of the elements. Raises ``ValueError`` for too few."""
        local = sum(segment.numel for segment in pieces.segments.values())
        total = sum(math.prod(shape) for shape in pieces.shapes.values())
        blocks = -(-local // self.block)
        budget = min(max(self.directions * local // max(1, total), 0), blocks * MOST)
        if budget < blocks * LEAST:
            raise ValueError(
                f"directions={self.directions} leave {budget} for the {blocks} blocks of {self.block} elements "
                f"that this rank holds; give at least {-(-blocks * LEAST * total // max(1, local))}, or larger blocks"
            )
        return budget


class Projections:
    """A `Reducer` that sends the projections of each delta on directions redrawn in each round."""

    def __init__(self, spec: Ferret, context: Context, budget: int) -> None:
        self._spec, self._context, self._budget = spec, context, budget

    def __call__(self, reduction: Reduction, fragment: Fragment, now: Round) -> list[Flow[Combined]]:
        context, spec, shard = self._context, self._spec, self._context.pieces.channel.places["shard"]
        drawn = Drawn(SharedRandom(context.seed % 2**64), reduction.captured, f"shard {shard.rank} of {shard.size}")
        weight = 1.0 if reduction.weight is None else reduction.weight
        values = reduction.sent or {}
        return [projected(values, drawn, context.place, spec.block, self._budget, spec.shrink, weight)]


@dataclass(frozen=True)
class Drawn:
    """The directions of a run, in a round, for a shard."""

    random: SharedRandom
    round: int
    shard: str

    def block(self, worker: int, number: int, directions: int, size: int) -> Tensor:
        """[directions, size]: V^T."""
        at = Address("ferret", self.round, worker, number)
        return self.random.signs(at, self.shard, directions * size).view(directions, size)


def projected(
    values: Named, drawn: Drawn, place: Place, block: int, budget: int, shrink: Shrink, weight: float
) -> Flow[Combined]:
    """The weighted mean of all peers' flat fp32 ``values``, estimated from ``budget`` directions of each."""
    flat = torch.cat([value.float() for value in values.values()]) if values else torch.zeros(0)
    blocks = flat.split(block) if flat.numel() else ()
    finite = weight > 0 and all_finite(values)
    needs = [float(delta.norm()) * math.sqrt(delta.numel()) if finite else 0.0 for delta in blocks]
    counts = allotted(needs, budget) if blocks else []
    numbers = torch.cat([
        drawn.block(place.rank, number, count, delta.numel()).to(delta.device) @ delta / count
        for number, (delta, count) in enumerate(zip(blocks, counts, strict=True))
    ]) if finite and blocks else flat.new_zeros(budget)  # fmt: skip
    scale = max(float(numbers.abs().max()) if budget else 0.0, torch.finfo(torch.float32).tiny) / LARGEST
    head = torch.tensor([scale, weight if finite else 0.0], device=flat.device)
    codes = (numbers / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    block_counts = torch.tensor(counts, dtype=torch.uint8, device=flat.device)
    heads, all_codes, all_counts = yield AllGather((head, codes, block_counts))

    weights = [float(weight) for weight in heads[:, 1].tolist()]
    total = math.fsum(weights)
    if total <= 0:
        return Combined({fqn: torch.zeros_like(value) for fqn, value in values.items()}, False)
    mean = torch.empty_like(flat)
    counted = [rank for rank in range(place.size) if weights[rank] > 0]
    starts = dict.fromkeys(counted, 0)
    counts_of_rank = all_counts.to(torch.int64).tolist()
    for number, block_mean in enumerate(mean.split(block) if flat.numel() else ()):
        block_mean.zero_()
        for rank in counted:
            count = counts_of_rank[rank][number]
            rank_codes = all_codes[rank][starts[rank] : starts[rank] + count].float()
            starts[rank] += count
            # Integers below 2^24: exact in whatever order they are added up.
            exact = rank_codes @ drawn.block(rank, number, count, block_mean.numel()).to(block_mean.device)
            block_mean.add_(exact.mul_(single(float(heads[rank, 0]) * weights[rank] / total)))
        if shrink == "least_error":
            directions = sum(counts_of_rank[rank][number] for rank in counted)
            block_mean.mul_(single(shrinkage(directions, block_mean.numel())))
    return Combined(dict(_cut(mean, values)), all_finite({"": mean}))


def allotted(needs: list[float], budget: int) -> list[int]:
    """``budget`` directions for blocks in proportion to ``needs``, each within LEAST and MOST.

    >>> allotted([3.0, 1.0, 0.0], 9)
    [6, 2, 1]

    The caller ensures that ``budget`` allows LEAST to MOST for each.
    """
    shares = torch.tensor(needs, dtype=torch.float64)
    shares = (shares / shares.max().clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=1e-9)
    low, high = 0.0, MOST / 1e-9
    for _ in range(100):  # bisection, to the last bit: the largest factor within the budget
        middle = (low + high) / 2
        fits = int((middle * shares).clamp(LEAST, MOST).floor().sum()) <= budget
        low, high = (middle, high) if fits else (low, middle)
    real = (low * shares).clamp(LEAST, MOST)
    counts = real.floor()
    remaining = budget - int(counts.sum())
    nearest = (real - counts).masked_fill(counts >= MOST, -1.0).argsort(descending=True, stable=True)
    counts[nearest[:remaining]] += 1
    return [int(count) for count in counts]


def ferret(
    *,
    every_steps: int = 20,
    outer: OuterOptimizer | None = None,
    directions: int = 8192,
    block: int = 16384,
    shrink: Shrink = "least_error",
    verify_every: int = VERIFY_ROUNDS,
    tie: Tie = "stop",
) -> Ferret:
    """Ferret: local updates that send a few kilobytes per round.

    Args:
        every_steps: inner steps in a round.
        outer: the outer optimizer; plain SGD with a rate of 1 by default. Shrunk means are small: rates above 1 pay.
        directions: numbers that each replica sends in a round, a byte each; at least one for each block.
        block: elements of a block.
        shrink: "least_error" scales the mean for the least squared error; "none" is unbiased, with a norm sqrt((K + d)
            / K) times the delta's.
        verify_every, tie: when replicas are compared, and what happens if they differ; see `local_update`.

    >>> ferret().directions
    8192

    Raises ``ValueError`` for numbers outside their range. Source: arXiv:2409.06277.
    """
    for name, value in (("directions", directions), ("block", block)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a positive whole number")
    if shrink not in ("least_error", "none"):
        raise ValueError(f"shrink is {shrink!r}; choose 'least_error' or 'none'")
    outer = sgd() if outer is None else outer
    loop = local_update(every_steps=every_steps, outer=outer, verify_every=verify_every, tie=tie)
    return Ferret(**vars(loop), directions=directions, block=block, shrink=shrink)


def _cut(flat: Tensor, like: Named) -> Iterator[tuple[str, Tensor]]:
    for cut, (fqn, value) in zip(flat.split([value.numel() for value in like.values()]), like.items(), strict=True):
        yield fqn, cut.to(value.dtype)
