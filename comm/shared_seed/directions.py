"""Steps along random directions from a shared seed: what a step is, and how it changes the parameters.

    x  <-  (1 - lr decay) x  -  lr / (M n)  sum over (worker m, sample k), in this order, of  g_mk z_mk

z_mk is the direction of (step, m, k) over all parameters, g_mk the number that replica m measured along it. With common
directions there is one z_k for all replicas, and a rule (median, trimmed mean, majority) combines their numbers.
Scalars are computed in fp64 and rounded to fp32 once; elements are added one direction after the other, on any rank.
So the result has the same bits for any sharding, on any device, in a run and in its replay.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dtrain.comm.layout import Named, Segment
from dtrain.comm.shadowed import on_shadows
from dtrain.comm.shared_seed.byte_codec import decode
from dtrain.comm.shared_seed.philox import Address, SharedRandom

Noise: TypeAlias = Literal["signs", "normal"]
Seeds: TypeAlias = Literal["per_worker", "common"]
Rule: TypeAlias = Literal["mean", "median", "trimmed_mean", "majority"]
At: TypeAlias = tuple[int, int, int]
"""Step, worker and sample of a direction."""

CHUNK = 2**18
"""Elements to which all directions of a step are added before the next ones: they stay in the cache."""


@dataclass(frozen=True)
class Walk:
    """The constants of a run: how directions are drawn, and the rule that combines numbers.

    ``trimmed``: how many of the largest and of the smallest numbers "trimmed_mean" leaves out.
    """

    key: int
    samples: int = 1
    noise: Noise = "signs"
    seeds: Seeds = "per_worker"
    rule: Rule = "mean"
    trimmed: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; a replica tries at least one direction in a step")
        if self.noise not in ("signs", "normal"):
            raise ValueError(f"noise is {self.noise!r}; choose 'signs' or 'normal'")
        if self.seeds == "per_worker" and self.rule != "mean":
            raise ValueError(
                f"rule is {self.rule!r}, and each replica has directions of its own, of which only a mean makes sense; "
                "use seeds='common'"
            )

    @property
    def random(self) -> SharedRandom:
        return SharedRandom(self.key)

    def directions(self, ats: Sequence[At], segments: Sequence[Segment]) -> list[Tensor]:
        """The values of each direction at each of ``segments``, direction by direction; fp32 on the CPU."""
        common = self.seeds == "common"
        addresses = [Address("direction", step, 0 if common else worker, sample) for step, worker, sample in ats]
        draw = self.random.signs_of if self.noise == "signs" else self.random.normal_of
        return draw([(at, segment) for at in addresses for segment in segments])


@dataclass(frozen=True)
class Step:
    """One step of all replicas: ``codes`` holds ``samples`` bytes of each of ``workers``, in their order.

    ``epoch`` counts changes of membership.
    """

    number: int
    epoch: int
    workers: tuple[int, ...]
    lr: float
    decay: float
    codes: bytes

    def __post_init__(self) -> None:
        if not self.workers or list(self.workers) != sorted(set(self.workers)):
            raise ValueError(f"the workers of a step are different numbers in ascending order, not {self.workers}")
        if len(self.codes) % len(self.workers):
            raise ValueError(f"{len(self.codes)} bytes of {len(self.workers)} workers: not as many of each")


def scales(walk: Walk, step: Step) -> Iterator[tuple[int, int, float]]:
    """(worker, sample, number in fp32 to multiply the direction with), in the order in which they are added."""
    samples = walk.samples
    if len(step.codes) != samples * len(step.workers):
        raise ValueError(
            f"step {step.number} has {len(step.codes)} bytes of {len(step.workers)} workers, where each sends {samples}"
        )
    numbers = [[decode(step.codes[m * samples + k]) for k in range(samples)] for m in range(len(step.workers))]
    if walk.seeds == "common":
        for sample in range(samples):
            yield 0, sample, single(-step.lr * _combined(walk, [row[sample] for row in numbers]) / samples)
        return
    share = samples * len(step.workers)
    for worker, row in zip(step.workers, numbers, strict=True):
        for sample, number in enumerate(row):
            yield worker, sample, single(-step.lr * number / share)


def walk_on(values: Named, segments: Mapping[str, Segment], walk: Walk, step: Step) -> None:
    """Change flat fp32 ``values``, the pieces ``segments`` of the parameters, in place as ``step`` says."""
    if step.decay:
        factor = single(1.0 - step.lr * step.decay)
        for value in values.values():
            value.mul_(factor)
    move(values, segments, walk, [((step.number, worker, sample), by) for worker, sample, by in scales(walk, step)])


def _passes(values: Named, segments: Mapping[str, Segment], walk: Walk, moves: Iterable[tuple[At, float]]) -> None:
    """`move` without values."""
    for _, by in moves:
        for value in values.values() if by else ():
            value.add_(by)


@on_shadows(_passes)
def move(values: Named, segments: Mapping[str, Segment], walk: Walk, moves: Iterable[tuple[At, float]]) -> None:
    """Add ``by`` times the direction ``at`` to flat fp32 ``values``, in place, for each of ``moves`` in their order."""
    nonzero = [(at, by) for at, by in moves if by]
    for cells in _cells(segments[fqn] for fqn in values):
        slices = [values[cell.fqn][cell.offset - segments[cell.fqn].offset :][: cell.numel] for cell in cells]
        at_once = max(1, CHUNK // sum(cell.numel for cell in cells))
        for start in range(0, len(nonzero), at_once):
            batch = nonzero[start : start + at_once]
            directions = iter(walk.directions([at for at, _ in batch], cells))
            for (_, by), values_of_cell in itertools.product(batch, slices):
                # The product is rounded before it is added: a fused multiply-add has other bits, where z is no sign.
                values_of_cell.add_(next(directions).mul_(by).to(values_of_cell.device))


def both_ways(values: Named, segments: Mapping[str, Segment], walk: Walk, at: At, by: float) -> Iterator[Named]:
    """``values`` + ``by`` z, then ``values`` - ``by`` z, in new tensors."""
    shift = {fqn: torch.zeros_like(value) for fqn, value in values.items()}
    move(shift, segments, walk, [(at, single(by))])
    yield {fqn: value + shift[fqn] for fqn, value in values.items()}
    yield {fqn: value - shift[fqn] for fqn, value in values.items()}


def _cells(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """``segments`` cut into cells, in groups of at most CHUNK elements."""
    cells: list[Segment] = []
    filled = 0
    for segment in segments:
        for start in range(segment.offset, segment.stop, CHUNK):
            cell = Segment(segment.fqn, start, min(CHUNK, segment.stop - start))
            if cells and filled + cell.numel > CHUNK:
                yield cells
                cells, filled = [], 0
            cells.append(cell)
            filled += cell.numel
    if cells:
        yield cells


def _combined(walk: Walk, numbers: list[float]) -> float:
    if walk.rule == "median":
        return median(numbers)
    if walk.rule == "majority":
        return float(sum(math.copysign(1.0, number) for number in numbers if number)) / len(numbers)
    if walk.rule == "trimmed_mean":
        if len(numbers) <= 2 * walk.trimmed:
            raise ValueError(f"trimmed={walk.trimmed} leaves nothing of {len(numbers)} replicas")
        numbers = sorted(numbers)[walk.trimmed : len(numbers) - walk.trimmed]
    return math.fsum(numbers) / len(numbers)


def single(number: float) -> float:
    """``number``, rounded to fp32; infinity beyond its range."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        return math.copysign(math.inf, number)
    return rounded
