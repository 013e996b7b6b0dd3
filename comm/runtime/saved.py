"""What a sync gives to be saved, and what it takes back: each rank's entries under a name that no other rank has.

    {"replica-0-of-2.shard-0-of-1": {"tensors": {fqn: {name: tensor}}, "holds": ..., "numbers": {name: number},
                                     "parameters": digest, "place": ..., "sync": ..., "optimizer": int,
                                     "live": {fqn: tensor}}}

Whoever puts the states of several ranks together by their keys (torch.distributed.checkpoint, a merged mapping) keeps
all of them so, and a rank finds its own. The entries are one value that is saved as a whole: a template to load into,
of a sync that has not stepped yet, need not know what there will be. Pickled, both are plain ordered dictionaries,
which ``torch.load`` reads with ``weights_only=True``.

A framework that asks every rank for its state, and writes what the main process got, throws the others away unread.
`RankedState` knows whether anybody has looked at it, and tells its sync when it goes without.
"""

from __future__ import annotations

import copy
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain.comm.layout import Segment
from dtrain.comm.ops import Place
from dtrain.comm.state import Kind, Numbers, Tensors

EACH_SAVES = (
    'Every rank saves its own: torch.save(sync.state_dict(), f"sync-{rank}.pt"), or torch.distributed.checkpoint with '
    '{"sync": sync}, which keeps all ranks\' (docs/own_loop.md)'
)

NOTHING_LOADED = (
    "this is what this sync itself gave as its state, and nothing was loaded into it since: is there none in the "
    "checkpoint? To go back to it in memory, take copy.deepcopy(sync.state_dict())"
)

LARGEST = 2**63
"""Of an integer, by amount: what a checkpoint keeps."""


class Entries:
    """One rank's entries. Read and changed like a dict; no ``Mapping``, so that nobody takes it apart."""

    def __init__(self, entries: dict[str, object]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> object:
        return self.entries[name]

    def __setitem__(self, name: str, value: object) -> None:
        self.entries[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def keys(self) -> list[str]:
        return list(self.entries)

    def pop(self, name: str, default: object = None) -> object:
        return self.entries.pop(name, default)

    def __repr__(self) -> str:
        return repr(self.entries)  # equal states look alike

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.entries.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> Entries:
        return Entries(copy.deepcopy(self.entries, memo))


class RankedState(dict[str, object]):
    """``{place: entries}`` of one rank. ``unread`` is called if it goes before anybody has looked into it."""

    def __init__(self, place: str, entries: Entries, unread: Callable[[], None] | None = None) -> None:
        super().__init__({place: entries})
        self._own = entries
        self._unread = unread

    def __getitem__(self, name: str) -> object:
        self._unread = None
        return super().__getitem__(name)

    def __missing__(self, name: str) -> object:
        return self._own[name]

    def __iter__(self) -> Iterator[str]:
        self._unread = None
        return super().__iter__()

    def keys(self) -> Any:
        self._unread = None
        return super().keys()

    def values(self) -> Any:
        self._unread = None
        return super().values()

    def items(self) -> Any:
        self._unread = None
        return super().items()

    def get(self, name: str, default: object = None) -> object:
        return self[name] if name in self or name in self._own else default

    def copy(self) -> dict[str, object]:
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(list(self.items()))

    def __deepcopy__(self, memo: dict[int, Any]) -> RankedState:
        self._unread = None
        return RankedState(next(iter(self)), copy.deepcopy(self._own, memo))

    def __del__(self) -> None:
        unread = getattr(self, "_unread", None)
        if unread is not None:
            unread()


def place_name(replica: Place, shard: Place) -> str:
    """Under which a rank's entries are saved.

    >>> place_name(Place(0, 2), Place(1, 4))
    'replica-0-of-2.shard-1-of-4'
    """
    return f"replica-{replica.rank}-of-{replica.size}.shard-{shard.rank}-of-{shard.size}"


def entries_for(state: object, place: str, *, whichever: bool) -> Mapping[str, object]:
    """The entries of ``place`` in ``state``, or ``state`` itself if it is that of one rank, as it was before.

    Args:
        state: as a sync gave it, or what was put together of several ranks' states. Entries that stand beside those of
            ranks replace theirs: ``state | {"sync": None}``.
        place: as `place_name` says.
        whichever: take another rank's entries, of as many replicas and shards, if there are none of ``place``.

    Raises ``TypeError`` for what is no state, ``ValueError`` if this rank's is not among them.
    """
    if isinstance(state, Entries):
        state = state.entries
    if not isinstance(state, Mapping):
        raise TypeError(
            f"the state of a sync is a mapping, as its state_dict() gives it; this is {type(state).__name__}"
        )
    ranked = {name: own for name, own in state.items() if isinstance(name, str) and name.startswith("replica-")}
    found: object = state
    if ranked:
        replaced = {name: value for name, value in state.items() if name not in ranked}
        others = [name for name in sorted(ranked) if _sizes(name) == _sizes(place)]
        name = place if place in ranked else next(iter(others), "") if whichever else ""
        if not name:
            raise ValueError(
                f"this state was taken by {', '.join(sorted(ranked))}, and this is {place}; every rank saves its own "
                "state, and every rank loads its own files"
            )
        own = ranked[name]
        if own is None:
            raise ValueError(NOTHING_LOADED)
        own = own.entries if isinstance(own, Entries) else own
        found = {**own, **replaced} if isinstance(own, Mapping) else own
    if not (
        isinstance(found, Mapping)
        and isinstance(found.get("tensors"), Mapping)
        and isinstance(found.get("numbers", found.get("integers")), Mapping)
    ):
        raise TypeError(
            "the state of a sync is {place: {'tensors': {fqn: {name: tensor}}, 'numbers': {name: number}, ...}}, as "
            f"its state_dict() gives it; this has the keys {', '.join(map(repr, [*state][:4])) or 'of nothing'}"
        )
    return found


def _sizes(name: str) -> list[str]:
    """How many replicas and shards there are."""
    return [part.rpartition("-of-")[2] for part in name.split(".")]


def holdings(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """What there is, and of which kind: ``{"name of fqn": "float32 [64]"}``.

    >>> holdings({"w": {"residual": torch.zeros(64)}})
    {'residual of w': 'float32 [64]'}
    """
    return {
        f"{name} of {fqn}": f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for fqn, named in tensors.items()
        for name, tensor in named.items()
    }


def require_same_sync(entries: Mapping[str, object], told: str, place: str | None) -> None:
    """Raise ``ValueError`` for the state of another method or, where that counts, of another rank than ``place``."""
    saved = renamed(entries.get("sync"))
    if saved not in (None, told):
        raise ValueError(
            f"this state was saved with {unlike(str(saved), told)}, and this is {unlike(told, str(saved))}; attach "
            "what it was saved with, or take out its entry 'sync' if the change is meant: "
            'load_state_dict(state | {"sync": None})'
        )
    if place is not None and entries.get("place") not in (None, place):
        raise ValueError(
            f"this state was taken by {entries['place']}, and this is {place}; every rank loads its own files"
        )


EARLIER = {
    "AttachedEveryStep": "every_step",
    "_AttachedOneBitAdam": "onebit_adam",
    "AttachedSparta": "sparta",
    "AttachedLocalUpdate": "local_update",
    "AttachedSharded": "local_update, sharded",
    "AttachedOffloaded": "local_update, offloaded",
    "AttachedElastic": "local_update, elastic",
    "AttachedDirected": "scaffold_m",
    "AttachedFerret": "ferret",
    "AttachedOneByte": "one_byte",
    "AttachedElasticOneByte": "one_byte, elastic",
    "AttachedFedKSeed": "fedkseed",
}
"""What methods were called in states that were saved before they had names of their own."""


def renamed(sync: object) -> object:
    """The description of a sync in a state, as it is today.

    >>> renamed("AttachedSharded: fp32; every_steps=5")
    'local_update, sharded: fp32; every_steps=5'
    """
    if not isinstance(sync, str):
        return sync
    name, colon, rest = sync.partition(":")
    return EARLIER.get(name, name) + colon + rest


def unlike(one: str, other: str) -> str:
    """The settings of ``one``, as `context.description` has them, that ``other`` does not have.

    >>> unlike("diloco: fp32; every_steps=5; mix=0.0", "diloco: fp32; every_steps=6; mix=0.0")
    'every_steps=5'
    """
    others = other.split("; ")
    return "; ".join(part for part in one.split("; ") if part not in others) or "nothing else"


def tensors_of(
    entries: Mapping[str, object], kinds: Mapping[str, Kind], segments: Mapping[str, Segment], always: Sequence[str]
) -> Tensors:
    """The tensors of a state, all that it says it holds, and such as this sync can go on with.

    ``always``: names of what is kept of every parameter from the first step on. Raises ``ValueError`` for missing,
    strange and unfitting ones.
    """
    tensors = entries["tensors"]
    assert isinstance(tensors, Mapping)
    for fqn, named in tensors.items():
        if not isinstance(named, Mapping) or not all(isinstance(tensor, Tensor) for tensor in named.values()):
            raise ValueError(f"the state to load holds no tensors by name for {fqn!r}, but {named!r}")
    unknown = sorted({str(name) for named in tensors.values() for name in named} - set(kinds))
    if unknown:
        raise ValueError(
            f"this state was saved with another sync: the state to load holds {unknown}, this sync keeps "
            f"{sorted(kinds)}"
        )
    listed, found = entries.get("holds"), holdings(tensors)
    if isinstance(listed, Mapping) and dict(listed) != found:
        said = {str(what): str(kind) for what, kind in listed.items()}
        wrong = sorted({*said.items()} ^ {*found.items()}) or [("its list", "no text")]
        lost, first = sorted({*said} - {*found}), wrong[0][0]
        what = f"{len(lost)} of them are missing ({lost[0]})" if lost else (
            f"{first}: {found.get(first, 'not there')}, was {said.get(first, 'not there')}"
        )  # fmt: skip
        raise ValueError(
            f"this state says that it holds {len(listed)} tensors, and {what}. Whatever saved or loaded it has changed "
            "it; load the state as a whole, as it was given"
        )
    for fqn, named in tensors.items():
        for name, tensor in named.items():
            if kinds[name] != "opaque":
                _require_piece(tensor, segments.get(fqn), f"{name} of {fqn}")
    without = [f"{name} of {fqn}" for fqn in segments for name in always if name not in tensors.get(fqn, {})]
    if without:
        raise ValueError(
            f"the state to load lacks {without[0]}, and {len(without) - 1} more tensors that this sync always keeps; "
            "load the state as a whole, as it was given"
        )
    return {fqn: dict(named) for fqn, named in tensors.items()}


def _require_piece(tensor: Tensor, segment: Segment | None, what: str) -> None:
    if segment is None:
        raise ValueError(f"the state to load holds {what}, of which this rank trains nothing; attach the same model")
    if tensor.shape != (segment.numel,) or tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the state to load holds {what} as {tensor.dtype} {list(tensor.shape)}, and this rank has "
            f"{segment.numel} elements of it, whose state is flat and fp32 (fp64 for a model in fp64)"
        )


def numbers_of(entries: Mapping[str, object], counters: tuple[str, ...], own: Mapping[str, float]) -> Numbers:
    """The numbers of a state. ``own``: those of the sync that is to load it.

    Raises ``ValueError`` for what is none, for anything but an integer where ``own`` has one, and for ``counters``
    below 0.
    """
    numbers = entries["numbers"] if "numbers" in entries else numbers_of_integers(entries["integers"])
    assert isinstance(numbers, Mapping)
    for name, value in numbers.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (whole and not -LARGEST <= value < LARGEST) or (not whole and isinstance(own.get(name), int)):
            raise ValueError(f"{name} of the state to load is {value!r}; it is an integer of 64 bits")
        if not whole and not (isinstance(value, float) and math.isfinite(value)):
            raise ValueError(f"{name} of the state to load is {value!r}; it is a finite number")
        if name in counters and value < 0:
            raise ValueError(f"{name} of the state to load is {value}; it counts, from 0")
    if missing := [name for name in counters if name not in numbers]:
        raise ValueError(f"this state was saved with another sync: {missing[0]} is missing")
    return dict(numbers)


BITS = re.compile(
    r"part\.\d+\.(scalar|rate|rate_steps|round_rate|last_rate)|knobs\.mix|moved|rate|(sum|seen)\.\d+|own\.\d+\.number"
    r"|(plan\.\d+\.)*plan\.(smoothness|scale|norm\..+)"
)
"""Floats that revisions before 24836cf kept as the integers of their bits."""


def numbers_of_integers(integers: object) -> object:
    """The numbers of a state or checkpoint that was written when both knew integers only.

    >>> numbers_of_integers({"steps": 3, "moved": 4607182418800017408})
    {'steps': 3, 'moved': 1.0}
    """
    if not isinstance(integers, Mapping):
        return integers
    numbers = dict(integers)
    for name, value in integers.items():
        if BITS.fullmatch(str(name)) and isinstance(value, int) and -LARGEST <= value < LARGEST:
            number = float(struct.unpack("<d", struct.pack("<q", value))[0])
            numbers[name] = int(number) if name.endswith(".rate_steps") and math.isfinite(number) else number
    return numbers
