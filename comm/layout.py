"""Which elements of which parameter a rank holds, and how flat values are cut into rows, matrices and messages.

Everything that outlives a step (residuals, outer parameters, momenta, checkpoints) is keyed by the fully qualified name
(FQN) of a parameter and by an element range of that parameter, flattened as if it were unsharded. Buckets, flat groups
and padding are internal to an engine and change from run to run, so nothing is ever keyed by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 2.0**60
"""The largest magnitude that feedback and other state accept: its sums and squares are far from overflow in fp32, so
that the next steps can be made from the state."""

MESSAGE = 1 << 22
"""Elements in one message: enough to amortize its latency, few enough for several messages to overlap."""


@dataclass(frozen=True, order=True)
class Segment:
    """The elements ``[offset, offset + numel)`` of parameter ``fqn``, flattened and unsharded.

    A rank holds at most one segment of a parameter; a segment may be empty.

    >>> Segment("head.weight", offset=6, numel=3).stop
    9
    """

    fqn: str
    offset: int
    numel: int

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Matrix:
    """How a flat piece of ``numel`` elements lies in rows of ``columns``, the first row short of ``lead`` elements."""

    numel: int
    columns: int
    lead: int

    @property
    def rows(self) -> int:
        return -(-(self.lead + self.numel) // self.columns)

    def view(self, flat: Tensor) -> Tensor:
        """``flat`` [numel] as [rows, columns]; a view where no row is cut."""
        missing = self.rows * self.columns - self.lead - self.numel
        padded = F.pad(flat, (self.lead, missing)) if self.lead or missing else flat
        return padded.view(self.rows, self.columns)

    def flat(self, matrix: Tensor) -> Tensor:
        """Undo `view`."""
        return matrix.reshape(-1)[self.lead : self.lead + self.numel]


def matrices(segments: Mapping[str, Segment], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Matrix]:
    """How each piece of this rank lies in its parameter; vectors and scalars have rows of one element.

    >>> matrices({"w": Segment("w", offset=6, numel=9)}, {"w": (5, 2, 2)})
    {'w': Matrix(numel=9, columns=4, lead=2)}
    """
    pieces = {}
    for fqn, segment in segments.items():
        columns = max(1, math.prod(shapes[fqn][1:]))
        pieces[fqn] = Matrix(segment.numel, columns, segment.offset % columns)
    return pieces


def even_slice(fqn: str, numel: int, *, part: int, parts: int) -> Segment:
    """The ``part``-th of ``parts`` equal slices of a parameter; the last ones are shorter, or empty.

    >>> [even_slice("w", 10, part=i, parts=4).numel for i in range(4)]
    [3, 3, 3, 1]
    """
    width = chunk_width(numel, parts)
    start = min(part * width, numel)
    return Segment(fqn, start, min(width, numel - start))


def chunk_width(numel: int, parts: int) -> int:
    """Elements in each of ``parts`` chunks that together cover ``numel`` elements (the last may be padding).

    >>> chunk_width(10, 4)
    3
    """
    return -(-numel // parts)


def to_rows(flat: Tensor, parts: int) -> Tensor:
    """Cut ``flat`` [numel] into ``rows`` [parts, width]; the end is padded with zeros. Copies only if it must pad."""
    width = chunk_width(flat.numel(), parts)
    missing = parts * width - flat.numel()
    if missing:
        padded = flat.new_zeros(parts * width)
        padded[: flat.numel()] = flat
        flat = padded
    return flat.reshape(parts, width)


def from_rows(rows: Tensor, numel: int) -> Tensor:
    """Undo `to_rows`: the first ``numel`` elements of ``rows`` [parts, width], flat."""
    return rows.reshape(-1)[:numel]


def working(tensor: Tensor) -> Tensor:
    """``tensor`` in the precision that values and state are kept in: fp64 stays, everything else is fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def is_finite(*values: Tensor, sums: list[Tensor] | None = None) -> bool:
    """Whether ``values``, on one device, hold no NaN and no infinity; in one pass without temporaries.

    ``sums``: of each of them, if computed already.
    """
    if sums is None:
        sums = [value.sum() for value in values]  # a sum with NaN or infinity is not finite
    if not sums or math.isfinite(float(torch.stack(sums).sum())):
        return True
    extremes = [torch.aminmax(value) for value in values if value.numel()]  # large numbers may sum to infinity
    return all(math.isfinite(float(least)) and math.isfinite(float(most)) for least, most in extremes)


def is_keepable(*values: Tensor, norms: list[Tensor] | None = None) -> bool:
    """Whether no element of ``values``, on one device, is NaN or above `LARGEST`; in one pass without temporaries.

    ``norms``: of each of them, if computed already.
    """
    if norms is None:
        norms = [torch.linalg.vector_norm(value) for value in values]
    if not norms or float(torch.stack(norms).max()) <= LARGEST:
        return True
    extremes = [torch.aminmax(value) for value in values if value.numel()]  # many numbers have a large norm
    return all(float(least) >= -LARGEST and float(most) <= LARGEST for least, most in extremes)


Named = Mapping[str, Tensor]
"""Flat tensors by FQN, fp32 or, for models in fp64, fp64: one rank's segments of gradients, parameters or deltas."""


def copied(values: Named) -> dict[str, Tensor]:
    """Copies of ``values``."""
    return {fqn: value.clone() for fqn, value in values.items()}


def messages(values: Named, elements: int = MESSAGE) -> list[dict[str, Tensor]]:
    """``values`` in their order, in groups of about ``elements``, at least one: one is encoded while another is sent.

    >>> import torch
    >>> [list(group) for group in messages({name: torch.zeros(3) for name in "abcd"}, elements=6)]
    [['a', 'b'], ['c', 'd']]
    """
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for fqn, value in values.items():
        if filled >= elements:
            groups.append({})
            filled = 0
        groups[-1][fqn] = value
        filled += value.numel()
    return groups


def in_messages(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """All names in their order, in groups of about one message each; larger ones where a model would need hundreds.

    Code that goes over a model by groups needs memory for one of them: about a 32nd of the model, or its largest
    parameter. By unsharded shapes, which are the same on all ranks.

    >>> in_messages({"a": (2, MESSAGE), "b": (7,), "c": (MESSAGE,), "d": (1,)})
    [['a'], ['b', 'c'], ['d']]
    """
    numels = {fqn: math.prod(shape) for fqn, shape in shapes.items()}
    elements = max(MESSAGE, sum(numels.values()) // 32)
    groups: list[list[str]] = [[]]
    filled = 0
    for fqn, numel in numels.items():
        if filled >= elements:
            groups.append([])
            filled = 0
        groups[-1].append(fqn)
        filled += numel
    return groups
