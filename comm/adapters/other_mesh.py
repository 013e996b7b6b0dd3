"""The part of a rank, made of the parts that the ranks of another mesh have saved.

    what                              as many replicas, other shards     another number of replicas
    equal on all replicas             exact                              exact
    a replica's own: residuals,       exact, replica r's own             the mean over the replicas, summed in replica
    under local updates parameters                                       order in fp64; step counts, integers and bools
    and optimizer; buffers                                               are replica 0's
    numbers                           exact, replica r's own             replica 0's
    opaque (factors of PowerSGD)      begun anew                         begun anew

The mean preserves what error feedback needs: the sum that the residuals add to the next mean. `dtrain train` does the
same with its own checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dtrain.comm.layout import Segment
from dtrain.comm.ops import Place
from dtrain.comm.state import Kind

PLACE = re.compile(r"replica-(\d+)-of-(\d+)\.shard-(\d+)-of-(\d+)$")
"""The end of a part's name, see `place_name`."""

Content: TypeAlias = Mapping[str, Any]
"""What a rank has saved, see `RankFiles`."""

Table: TypeAlias = dict[tuple[str, str, str], Tensor]
"""By "parameters", "buffers", "optimizer" or "sync"; the name of the state; the name of the parameter or buffer."""


@dataclass(frozen=True)
class Wanted:
    """What one rank of the present mesh needs.

    ``segments``, ``held``, ``shapes``: see `Pieces`. ``stepped``: the name and this rank's shape of each parameter of
    the inner optimizer, in its order; None for a DeepSpeed engine. ``kinds``: of what the sync keeps. ``live``: of
    parameters and optimizer. ``place``: on the replicate axis.
    """

    segments: Mapping[str, Segment]
    held: Mapping[str, Segment]
    shapes: Mapping[str, tuple[int, ...]]
    stepped: Sequence[tuple[str, torch.Size]] | None
    kinds: Mapping[str, Kind]
    live: Kind
    place: Place


def mesh_of(names: Iterable[str]) -> tuple[int, int] | None:
    """The replicas and shards of a mesh of which these are the parts of all ranks; None if they are not.

    >>> mesh_of(["replica-0-of-2.shard-0-of-1", "replica-1-of-2.shard-0-of-1"])
    (2, 1)
    >>> mesh_of(["replica-1-of-2.shard-0-of-1"]) is None
    True
    """
    places = [tuple(int(number) for number in match.groups()) for name in names if (match := PLACE.search(name))]
    sizes = {(replicas, shards) for _, replicas, _, shards in places}
    return sizes.pop() if len(sizes) == 1 and len({*places}) == math.prod(next(iter(sizes))) else None


def remade(read: Callable[[int, int], Content], mesh: tuple[int, int], wanted: Wanted) -> dict[str, Any]:
    """What this rank would have saved, from ``read(replica, shard)`` of a ``mesh`` of replicas and shards.

    One replica's parts are in memory at a time. Raises ``ValueError`` for parts of another model or engine, without
    what is needed to cut them, or with state of an optimizer that is not elementwise.
    """
    replicas, shards = mesh
    tables: list[Table] = []
    first: Content = {}
    for replica in [wanted.place.rank] if replicas == wanted.place.size else range(replicas):
        parts = [read(replica, shard) for shard in range(shards)]
        first = first or parts[0]
        tables.append(_cut(parts, wanted))
    kinds = {**wanted.kinds, "parameters": wanted.live, "optimizer": wanted.live, "buffers": "per_worker"}
    table: Table = {}
    for key, value in tables[0].items():
        kind = kinds[key[1] if key[0] == "sync" else key[0]]
        table[key] = _mean([other[key] for other in tables]) if kind == "per_worker" else value
    return _content(table, first, wanted)


def _cut(parts: Sequence[Content], wanted: Wanted) -> Table:
    """What this rank needs of one replica."""
    if any(not {"segments", "held"} <= part.keys() for part in parts):
        raise ValueError(
            "an earlier version of dtrain saved this, without where its pieces lie in the parameters; resume on as "
            "many ranks as saved"
        )
    saved = {fqn for part in parts for fqn in part["parameters"]}
    here = {fqn for fqn, shape in wanted.shapes.items() if math.prod(shape)}
    if saved != here:
        raise ValueError(
            f"what was saved are the parameters of another model: {sorted(saved ^ here)[0]} is only "
            f"{'there' if saved - here else 'here'}; attach to the model that was saved"
        )
    table: Table = {("buffers", "", name): value for name, value in parts[0]["buffers"].items()}
    for kind, name, values in _kept(parts, wanted):
        cut, needed = ("held", wanted.held) if kind == "optimizer" else ("segments", wanted.segments)
        for fqn, want in needed.items():
            holders = [
                (Segment(fqn, *part[cut][fqn]), tensors[fqn])
                for part, tensors in zip(parts, values, strict=True)
                if fqn in tensors
            ]
            if holders:
                table[kind, name, fqn] = _piece(f"{name or kind} of {fqn}", holders, want)
    return table


def _kept(parts: Sequence[Content], wanted: Wanted) -> Iterator[tuple[str, str, list[Mapping[str, Tensor]]]]:
    """Of each kind and name what every part has, by parameter."""
    yield "parameters", "", [part["parameters"] for part in parts]
    states = [_by_name(part["optimizer"]["state"], wanted.stepped) for part in parts]
    for name in sorted({name for state in states for name in state}):
        yield "optimizer", name, [state.get(name, {}) for state in states]
    tensors = [_entries(part)["tensors"] for part in parts]
    for name, kind in wanted.kinds.items():
        if kind == "partitioned":
            raise ValueError(f"{name} is kept by one rank for all; resume on as many ranks as saved")
        if kind != "opaque":
            yield "sync", name, [{f: named[name] for f, named in one.items() if name in named} for one in tensors]


def _by_name(
    state: Mapping[Any, Mapping[str, Any]], stepped: Sequence[tuple[str, object]] | None
) -> dict[str, dict[str, Tensor]]:
    """An optimizer's state by name and parameter, from that by number and name."""
    if any(isinstance(key, int) is (stepped is None) for key in state):
        raise ValueError("the optimizer was saved in another engine, DeepSpeed's or not; resume in the same one")
    if stepped is None:
        return {name: dict(tensors) for name, tensors in state.items()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for number, named in state.items():
        for name, value in named.items():
            if value is not None:  # SGD without momentum
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                by_name.setdefault(name, {})[stepped[number][0]] = tensor
    return by_name


def _piece(label: str, holders: Sequence[tuple[Segment, Tensor]], want: Segment) -> Tensor:
    """The elements of ``want``, from pieces that together cover them; a number as it is."""
    if holders[0][1].dim() == 0:
        return holders[0][1]
    out = torch.empty(want.numel, dtype=holders[0][1].dtype)
    position = want.offset
    for segment, value in sorted(holders, key=lambda holder: holder[0].offset):
        if value.numel() != segment.numel:
            raise ValueError(
                f"{label} has shape {tuple(value.shape)} where that rank had {segment.numel} elements; what is not "
                "elementwise is resumed on as many ranks as saved"
            )
        stop = min(segment.stop, want.stop)
        if segment.offset <= position < stop:
            begin = position - segment.offset
            out[position - want.offset : stop - want.offset] = value.reshape(-1)[begin : begin + stop - position]
            position = stop
    if position < want.stop:
        raise ValueError(f"no part has element {position} of {label}; resume on as many ranks as saved")
    return out


def _mean(values: Sequence[Tensor]) -> Tensor:
    first = values[0]
    if len(values) == 1 or first.dim() == 0 or not first.is_floating_point():
        return first
    total = first.double()
    for value in values[1:]:
        total = total + value.double()
    return (total / len(values)).to(first.dtype)


def _content(table: Table, first: Content, wanted: Wanted) -> dict[str, Any]:
    """``table`` as this rank would have saved it; what is no tensor is that of ``first``."""
    state: dict[Any, dict[str, Any]] = {}
    kept: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}}
    numbers = {fqn: number for number, (fqn, _) in enumerate(wanted.stepped or ())}
    for (kind, name, fqn), value in table.items():
        if kind == "sync":
            kept.setdefault(fqn, {})[name] = value
        elif kind != "optimizer":
            whole[kind][fqn] = value
        elif wanted.stepped is None:
            state.setdefault(name, {})[fqn] = value
        else:
            shape = wanted.stepped[numbers[fqn]][1]
            state.setdefault(numbers[fqn], {})[name] = value.view(shape) if value.dim() else value
    entries = _entries(first)
    return {
        "format": first["format"],
        **whole,
        "optimizer": {"state": state, "groups": first["optimizer"]["groups"]},
        "sync": {"tensors": kept, "numbers": entries["numbers"], "sync": entries["sync"]},
    }


def _entries(part: Content) -> Mapping[str, Any]:
    """What the sync of that rank has kept."""
    entries: Mapping[str, Any] = next(iter(part["sync"].values()))
    return entries
