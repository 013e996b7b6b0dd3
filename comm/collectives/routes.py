"""Which way values take to all peers, and what each way costs.

    two_phase           any compressor; the owner of a chunk encodes the mean as each rank has encoded its own
    all_gather          any compressor; every rank's payload goes to all: one phase, whose only error is each rank's own
    sparse_all_reduce   two phases, in the second of which a sparse compressor sends what several ranks have sent
                        together: `UNION` times as many elements, or all of them where fp32 is smaller
    all_reduce          linear compressors; the transport's own sum

"auto" is "two_phase", except for a sparse compressor (`Sparse`). Its ranks send different elements, so their mean has
up to W times as many, of which the second of two equal phases leaves most behind. "auto" is then "all_gather", or
"sparse_all_reduce" where that sends clearly fewer bytes of a long row: a choice by the compressor and the number of
ranks only, the same on all ranks and in all buckets. What an owner cannot send it feeds back.

With b(n) the bytes of a row, and u(n) those of a union, each rank sends for n elements

    two_phase 2 (W - 1) b(n / W);   all_gather (W - 1) b(n);   sparse_all_reduce (W - 1) (b(n / W) + u(n / W))

Source: sparse all-reduce with a bounded second phase, Li and Hoefler, arXiv:2201.07598 (Ok-Topk).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from dtrain.comm.collectives.two_phase import IDENTITY
from dtrain.comm.compressors.compressor import Compressor, is_sparse, union
from dtrain.comm.feedback import Compression
from dtrain.comm.layout import chunk_width

Route: TypeAlias = Literal["auto", "two_phase", "all_gather", "sparse_all_reduce", "all_reduce"]
ROUTES: tuple[Route, ...] = get_args(Route)

SPARSE_ROUTES: tuple[Route, Route] = ("all_gather", "sparse_all_reduce")

UNION = 3
"""Ranks whose elements the second phase of "sparse_all_reduce" has room for."""

TWO_PAY = 0.9
"""The fraction of an all-gather's bytes below which "auto" takes the two messages of "sparse_all_reduce"."""

LONG = 1 << 20
"""Elements of the row by which "auto" compares routes."""


def route_of(compression: Compression, world: int, route: Route = "auto") -> Route:
    """The route of values with ``compression``: ``route``, or what "auto" chooses between ``world`` ranks.

    >>> from dtrain.comm.feedback import as_compression
    >>> from dtrain.compress import quantize, topk
    >>> [route_of(as_compression(topk(0.01)), world) for world in (2, 4, 16)]
    ['all_gather', 'all_gather', 'sparse_all_reduce']
    >>> route_of(as_compression(quantize(bits=4)), world=4)
    'two_phase'
    """
    return _chosen(compression.by_row, world) if route == "auto" else route


def _chosen(compressor: Compressor | None, world: int) -> Route:
    """What "auto" chooses."""
    if compressor is None or not is_sparse(compressor):
        return "two_phase"
    gathered, owned = (value_bytes(way, LONG, compressor, world) for way in SPARSE_ROUTES)
    return "sparse_all_reduce" if owned < TWO_PAY * gathered else "all_gather"


def of_the_mean(compression: Compression, world: int, route: Route) -> Compression:
    """The compression of a chunk's mean, in the second phase of ``route``."""
    compressor = compression.by_row
    if compressor is None or route_of(compression, world, route) != "sparse_all_reduce":
        return compression
    return replace(compression, compressor=_union(compressor, world))


def route_bytes(
    route: Route, numels: Sequence[int], compressor: Compressor, world: int, *, weighted: bool = False
) -> int:
    """Bytes that one rank sends for one message over segments of ``numels`` elements, on any route but "all_reduce".

    >>> from dtrain.compress import topk
    >>> ways = ("two_phase", "all_gather", "sparse_all_reduce")
    >>> [route_bytes(way, [1_000_000], topk(0.01), world=8) for way in ways]
    [88746, 354928, 172487]
    """
    votes = 1 if (_chosen(compressor, world) if route == "auto" else route) == "all_gather" else 2
    values = sum(value_bytes(route, numel, compressor, world) for numel in numels)
    return values + (world - 1) * (votes + 3 * weighted)


def value_bytes(route: Route, numel: int, compressor: Compressor, world: int) -> int:
    """`route_bytes` of one value of ``numel`` elements, without the votes of its message."""
    route = _chosen(compressor, world) if route == "auto" else route
    if route == "all_gather":
        return (world - 1) * compressor.row_bytes(numel)
    width = chunk_width(numel, world)
    second = _union(compressor, world) if route == "sparse_all_reduce" else compressor
    return (world - 1) * (compressor.row_bytes(width) + second.row_bytes(width))


def described(chosen: Mapping[str, Compression], numels: Mapping[str, int], world: int, route: Route) -> str | None:
    """The routes of all that is sparse, and their bytes per rank, as text; None where nothing is, or none is sent.

    ``chosen``: the compression of each parameter; ``numels``: elements of each on this rank.
    """
    coders = {fqn: coder for fqn, coding in chosen.items() if (coder := coding.by_row) is not None and is_sparse(coder)}
    if not coders or world == 1:
        return None
    taken = {fqn: route_of(chosen[fqn], world, route) for fqn in coders}

    def kilobytes(routes: Mapping[str, Route]) -> str:
        return f"{sum(value_bytes(routes[fqn], numels[fqn], coders[fqn], world) for fqn in coders) / 1e3:,.1f} kB"

    ways: tuple[Route, ...] = ("two_phase", *SPARSE_ROUTES)
    counts = " and ".join(f"{count} by {way}" for way in ROUTES if (count := list(taken.values()).count(way)))
    others = ", ".join(f"{way} {kilobytes(dict.fromkeys(coders, way))}" for way in ways)
    dense = 2 * (world - 1) * sum(4 * chunk_width(numels[fqn], world) for fqn in coders) / 1e3
    return (
        f"of {len(coders)} sparse parameters between {world} replicas go {counts}: {kilobytes(taken)} per exchange and "
        f"replica (all of them by {others}; dense {dense:,.1f} kB)"
    )


def _union(compressor: Compressor, world: int) -> Compressor:
    """The compressor of what several ranks send together: wider by as many, or fp32 where that is smaller."""
    wider = union(compressor, min(world, UNION))
    if wider is None:
        return compressor
    return wider if wider.row_bytes(LONG) < IDENTITY.row_bytes(LONG) else IDENTITY
