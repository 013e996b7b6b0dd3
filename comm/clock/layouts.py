"""What a rank holds of each parameter, and which gradients each engine exchanges together, and when.

The cuts are those of the adapters in `dtrain.comm.adapters` and of the engines that they adapt: DDP's buckets, FSDP2's
units and rows of dim 0, DeepSpeed's partitions. Tests compare the bytes with those of real runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from dtrain.comm.clock.step import Parameter, Step, layer_of
from dtrain.comm.layout import Segment, chunk_width, even_slice
from dtrain.comm.ops import Place

END = -1
"""The place of what is exchanged after the backward pass."""
ZERO_MESSAGE_BYTES = 25 * 2**20
ALIGNMENT = 2
"""DeepSpeed's stages 1 and 2 pad a flat group to a multiple of this, times the ranks of a replica."""


@dataclass(frozen=True)
class Group:
    """Gradients that are exchanged in one flow, once the backward pass of layer ``after`` has ended."""

    fqns: tuple[str, ...]
    after: int = END


@dataclass(frozen=True)
class Layout:
    """What one rank holds and exchanges.

    ``segments``: what it owns. ``groups``: in the order of exchange; ``first``: those of the first step. ``whole``: it
    holds all of each parameter, and gathers over the shard axis what the others own. ``present``: what the engine tells
    an exchange, see `Exchange`. ``units``: whose order replicas agree on after the first exchange.
    """

    segments: Mapping[str, Segment]
    groups: Sequence[Group]
    first: Sequence[Group] = ()
    whole: bool = False
    present: bool | None = None
    units: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)

    def of_step(self, number: int) -> Sequence[Group]:
        """The groups of step ``number``."""
        return self.first if number == 0 and self.first else self.groups


Engine: TypeAlias = Callable[[Step, Place, float], Layout]
"""(step, this rank on the shard axis, the largest bucket in MiB) -> what the rank holds."""


def module(step: Step, shard: Place, bucket_mib: float = 4.0) -> Layout:
    """A model that is not wrapped: one exchange of all gradients, after the backward pass."""
    sizes = _sizes(step)
    segments = {fqn: Segment(fqn, 0, numel) for fqn, numel in sizes.items()}
    return Layout(segments, [Group(tuple(segments))], sizes=sizes)


def ddp(step: Step, shard: Place, bucket_mib: float = 4.0) -> Layout:
    """Slices of every parameter. A bucket is closed by the parameter that fills it; in the first step there is one."""
    sizes = _sizes(step)
    slices = (even_slice(fqn, numel, part=shard.rank, parts=shard.size) for fqn, numel in sizes.items())
    segments = {segment.fqn: segment for segment in slices if segment.numel}
    limit, places = int(bucket_mib * 2**20), layer_of(step.layers)
    backwards = [parameter for layer in reversed(step.layers) for parameter in reversed(layer.parameters)]
    groups = [_bucket(bucket, places) for bucket in _buckets(backwards, limit)]
    first = [_bucket(bucket, places) for bucket in reversed(list(_buckets(list(step.parameters), math.inf)))]
    return Layout(segments, groups, first, whole=True, sizes=sizes)


def fsdp(step: Step, shard: Place, bucket_mib: float = 4.0) -> Layout:
    """Rows of dim 0. Each block is a unit, and all other parameters are the root's, which comes last."""
    segments = {}
    for parameter in step.parameters:
        rows, row = parameter.shape[0] if parameter.shape else 1, math.prod(parameter.shape[1:])
        width = chunk_width(rows, shard.size)
        begin = min(shard.rank * width, rows)
        segments[parameter.fqn] = Segment(parameter.fqn, begin * row, min(width, rows - begin) * row)
    places = layer_of(step.layers)
    units: dict[tuple[str, int] | None, list[str]] = {None: []}
    for parameter in step.parameters:
        units.setdefault(parameter.block, []).append(parameter.fqn)
    root = units.pop(None)
    groups = [Group(tuple(fqns), min(places[fqn] for fqn in fqns)) for fqns in reversed(units.values())]
    if root:
        groups.append(Group(tuple(root), 0))
    owned = {fqn: segment for fqn, segment in segments.items() if segment.numel}
    held = [Group(tuple(fqn for fqn in group.fqns if fqn in owned), group.after) for group in groups]
    return Layout(owned, held, present=True, units=len(groups), sizes=_sizes(step))


def zero12(step: Step, shard: Place, bucket_mib: float = 4.0) -> Layout:
    """Partitions of one flat group of all parameters, which cross their borders; exchanged after the backward pass."""
    total = sum(parameter.numel for parameter in step.parameters)
    multiple = ALIGNMENT * shard.size
    width = -(-total // multiple) * multiple // shard.size
    begin, end, start, segments = shard.rank * width, (shard.rank + 1) * width, 0, {}
    for parameter in step.parameters:
        first, last = max(begin, start), min(end, start + parameter.numel)
        if first < last:
            segments[parameter.fqn] = Segment(parameter.fqn, first - start, last - first)
        start += parameter.numel
    return Layout(segments, _messages(segments), sizes=_sizes(step))


def zero3(step: Step, shard: Place, bucket_mib: float = 4.0) -> Layout:
    """A partition of each parameter, exchanged after the backward pass."""
    slices = (even_slice(p.fqn, p.numel, part=shard.rank, parts=shard.size) for p in step.parameters)
    segments = {segment.fqn: segment for segment in slices if segment.numel}
    return Layout(segments, _messages(segments), sizes=_sizes(step))


ENGINES: Mapping[str, Engine] = {
    "module": module, "ddp": ddp, "fsdp": fsdp, "zero1": zero12, "zero2": zero12, "zero3": zero3,
}  # fmt: skip


def layout(engine: str, step: Step, shard: Place, bucket_mib: float = 4.0) -> Layout:
    """What the rank ``shard`` of a replica holds under ``engine``.

    >>> step = Step.even({"layers.0.w": (6, 2)}, seconds=1.0)
    >>> layout("fsdp", step, Place(1, 2)).segments["layers.0.w"].numel
    6

    Raises ``ValueError`` for an engine that is not known, and for a bucket without a size.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}; choose {', '.join(ENGINES)}")
    if not bucket_mib > 0:
        raise ValueError(f"bucket_mib={bucket_mib!r}; a bucket holds more than 0 MiB")
    return ENGINES[engine](step, shard, bucket_mib)


def _sizes(step: Step) -> dict[str, int]:
    return {parameter.fqn: parameter.numel for parameter in step.parameters}


def _buckets(parameters: Sequence[Parameter], limit: float) -> Iterator[list[Parameter]]:
    """DDP's: of one dtype each, in the order in which they are full; then those that never are."""
    filling: dict[object, list[Parameter]] = {}
    for parameter in parameters:
        bucket = filling.setdefault(parameter.dtype, [])
        bucket.append(parameter)
        if sum(p.numel * p.dtype.itemsize for p in bucket) >= limit:
            yield filling.pop(parameter.dtype)
    yield from filling.values()


def _bucket(bucket: Sequence[Parameter], places: Mapping[str, int]) -> Group:
    return Group(tuple(p.fqn for p in bucket), min(places[p.fqn] for p in bucket))


def _messages(segments: Mapping[str, Segment]) -> list[Group]:
    groups: list[list[str]] = [[]]
    filled = 0
    for fqn, segment in segments.items():
        if filled >= ZERO_MESSAGE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(fqn)
        filled += 4 * segment.numel
    return [Group(tuple(fqns)) for fqns in groups if fqns]
