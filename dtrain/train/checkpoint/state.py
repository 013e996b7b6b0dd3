"""One rank's state in a checkpoint, independent of the engine.

Tensors are keyed by section and fully qualified name (FQN) and cut along the rank's `Segment`s, so that any engine
can read what any other one wrote, on any mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from dtrain.comm.layout import Segment
from dtrain.errors import CheckpointError

Kind = Literal["replicated", "per_worker"]
"""``replicated``: bitwise equal on all replicas, stored once. ``per_worker``: each replica has its own."""

RNG = "rng"
BUFFERS = "buffers"
OPAQUE = "opaque"
RESERVED = ("", RNG, BUFFERS, OPAQUE)
SEPARATOR = "|"


@dataclass(frozen=True)
class Placement:
    """Where a rank stands in the mesh: rank = replica * shards + shard.

    >>> Placement(replica=1, replicas=2, shard=0, shards=2).rank
    2
    """

    replica: int
    replicas: int
    shard: int
    shards: int

    def __post_init__(self) -> None:
        if not (0 <= self.replica < self.replicas and 0 <= self.shard < self.shards):
            raise CheckpointError(
                f"replica {self.replica} of {self.replicas}, shard {self.shard} of {self.shards} is no place in a mesh"
            )

    @property
    def rank(self) -> int:
        return self.replica * self.shards + self.shard

    @property
    def world(self) -> int:
        return self.replicas * self.shards


@dataclass
class RankState:
    """Everything of one rank that survives a step.

    - ``segments``: what this rank holds of each parameter (a segment may be empty).
    - ``sections``: section -> fqn -> tensor: flat, [segment.numel], or 0-dim (an optimizer's step count), any dtype.
      A section may leave out parameters. Both "parameters" and what belongs to a method ("sync.residual") are sections.
    - ``kinds``: one `Kind` per section, equal on all ranks.
    - ``numbers``: equal on all ranks of a replica. ``rng``: this rank's own, any shape. ``buffers``: whole tensors,
      equal on all ranks of a replica (BatchNorm statistics). ``opaque``: this rank's own, any shape, valid only for
      this way of sharding the model (the factors of a low-rank method).
    - ``translated``: set by `load` only: what was not restored exactly, and how it was derived instead. Empty after
      a resume on a mesh with the same number of replicas and shards. `write` ignores it.

    Raises CheckpointError at construction, and again in `write`, for tensors that do not fit their segments.
    """

    segments: dict[str, Segment]
    sections: dict[str, dict[str, Tensor]]
    kinds: dict[str, Kind]
    numbers: dict[str, int | float] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    opaque: dict[str, Tensor] = field(default_factory=dict)
    translated: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise CheckpointError, with the section and name, for the first thing that does not fit."""
        for fqn, segment in self.segments.items():
            if segment.fqn != fqn or segment.offset < 0 or segment.numel < 0:
                raise CheckpointError(f"segments[{fqn!r}] is {segment}: another name, or a range below zero")
        if self.kinds.keys() != self.sections.keys():
            odd = sorted(self.kinds.keys() ^ self.sections.keys())
            raise CheckpointError(f"every section needs a kind and every kind a section; these have one only: {odd}")
        for section, tensors in self.sections.items():
            if section in RESERVED or SEPARATOR in section:
                raise CheckpointError(f"a section cannot be called {section!r}: reserved, empty, or with {SEPARATOR!r}")
            if self.kinds[section] not in get_args(Kind):
                raise CheckpointError(
                    f"section {section!r} is of unknown kind {self.kinds[section]!r}; known: {get_args(Kind)}"
                )
            for fqn, tensor in tensors.items():
                _fits(section, fqn, tensor, self.segments)
        for name, value in self.numbers.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise CheckpointError(f"numbers[{name!r}] is {value!r}, not a finite number")


def _fits(section: str, fqn: str, tensor: Tensor, segments: Mapping[str, Segment]) -> None:
    if fqn not in segments:
        raise CheckpointError(f"section {section!r} has {fqn!r}, of which this rank declares no segment")
    segment = segments[fqn]
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.numel() != segment.numel):
        raise CheckpointError(
            f"section {section!r}, {fqn!r}: shape {tuple(tensor.shape)} for a segment of {segment.numel} elements; "
            "give the flat piece, or a 0-dim tensor"
        )


def check_segments(segments: Mapping[str, Segment], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError unless every segment lies within its parameter as ``shapes`` gives it."""
    for fqn, segment in segments.items():
        if fqn not in shapes:
            raise CheckpointError(f"segment of {fqn!r}, but the parameter shapes have no such name")
        if segment.stop > math.prod(shapes[fqn]):
            raise CheckpointError(
                f"segment [{segment.offset}, {segment.stop}) of {fqn!r} ends beyond its shape {tuple(shapes[fqn])}"
            )
