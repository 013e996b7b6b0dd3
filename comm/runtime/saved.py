"""The saved form of a sync's state: each rank's entries under a key of its own.

    {"replica-0-of-2.shard-0-of-1": {"tensors": {fqn: {name: tensor}}, "holds": ..., "numbers": {name: number},
                                     "parameters": digest, "place": ..., "sync": ..., "optimizer": int,
                                     "live": {fqn: tensor}}}

The states of several ranks can be merged by key (torch.distributed.checkpoint, ``state | other``), and each rank finds
its entries again. A rank's entries are saved as one value, so a load template, taken before the first step, need not
list the tensors that are to be loaded. Pickled, both are plain ordered dictionaries, which ``torch.load`` reads with
``weights_only=True``.

Some frameworks ask every rank for its state, write the main process's, and discard the others unread. `RankedState`
records whether it was read, and reports to its sync if it is discarded unread.
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
"""A checkpoint keeps integers from -LARGEST to LARGEST - 1."""


class Entries:
    """One rank's entries: read and changed like a dict, but no ``Mapping``, so that they are saved as one value."""

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
        return repr(self.entries)  # equal states have equal representations

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.entries.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> Entries:
        return Entries(copy.deepcopy(self.entries, memo))


class RankedState(dict[str, object]):
    """``{place: entries}`` of one rank. ``unread`` is called if this is garbage-collected before it was read."""

    def __init__(self, place: str, entries: Entries, unread: Callable[[], None] | None = None) -> None:
        super().__init__({place: entries})
        self._entries = entries
        self._unread = unread

    def __getitem__(self, name: str) -> object:
        self._unread = None
        return super().__getitem__(name)

    def __missing__(self, name: str) -> object:
        return self._entries[name]

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
        return self[name] if name in self or name in self._entries else default

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
        return RankedState(next(iter(self)), copy.deepcopy(self._entries, memo))

    def __del__(self) -> None:
        unread = getattr(self, "_unread", None)
        if unread is not None:
            unread()


def place_name(replica: Place, shard: Place) -> str:
    """The key under which a rank's entries are saved.

    >>> place_name(Place(0, 2), Place(1, 4))
    'replica-0-of-2.shard-1-of-4'
    """
    return f"replica-{replica.rank}-of-{replica.size}.shard-{shard.rank}-of-{shard.size}"


def entries_for(state: object, place: str, *, whichever: bool) -> Mapping[str, object]:
    """The entries of ``place`` in ``state``, or ``state`` itself if it is one rank's (older states are).

    Args:
        state: of one sync, or the merged states of several ranks. Entries beside those of ranks replace theirs:
            ``state | {"sync": None}``.
        place: see `place_name`.
        whichever: without entries of ``place`` take another rank's, of a run of as many replicas and shards.

    Raises ``TypeError`` if ``state`` is no sync's state, ``ValueError`` if it lacks this rank's entries.
    """
    if isinstance(state, Entries):
        state = state.entries
    if not isinstance(state, Mapping):
        raise TypeError(
            f"the state of a sync is a mapping, as its state_dict() gives it; this is {type(state).__name__}"
        )
    ranked = {key: value for key, value in state.items() if isinstance(key, str) and key.startswith("replica-")}
    entries: object = state
    if ranked:
        replaced = {name: value for name, value in state.items() if name not in ranked}
        same_sizes = [name for name in sorted(ranked) if _sizes(name) == _sizes(place)]
        name = place if place in ranked else next(iter(same_sizes), "") if whichever else ""
        if not name:
            raise ValueError(
                f"this state was taken by {', '.join(sorted(ranked))}, and this is {place}; every rank saves its own "
                "state, and every rank loads its own files"
            )
        entries = ranked[name]
        if entries is None:
            raise ValueError(NOTHING_LOADED)
        entries = entries.entries if isinstance(entries, Entries) else entries
        entries = {**entries, **replaced} if isinstance(entries, Mapping) else entries
    if not (
        isinstance(entries, Mapping)
        and isinstance(entries.get("tensors"), Mapping)
        and isinstance(entries.get("numbers", entries.get("integers")), Mapping)
    ):
        raise TypeError(
            "the state of a sync is {place: {'tensors': {fqn: {name: tensor}}, 'numbers': {name: number}, ...}}, as "
            f"its state_dict() gives it; this has the keys {', '.join(map(repr, [*state][:4])) or 'of nothing'}"
        )
    return entries


def _sizes(name: str) -> list[str]:
    """The numbers of replicas and of shards."""
    return [rank.rpartition("-of-")[2] for rank in name.split(".")]


def holdings(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """The dtype and shape of each tensor: ``{"name of fqn": "float32 [64]"}``.

    >>> holdings({"w": {"residual": torch.zeros(64)}})
    {'residual of w': 'float32 [64]'}
    """
    return {
        f"{name} of {fqn}": f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for fqn, named in tensors.items()
        for name, tensor in named.items()
    }


def require_same_sync(entries: Mapping[str, object], description: str, place: str | None) -> None:
    """Raise ``ValueError`` for the state of another method, or of a rank other than ``place`` (None: any rank's)."""
    saved = renamed(entries.get("sync"))
    if saved is not None and without_stages(str(saved)) != without_stages(description):
        raise ValueError(
            f"this state was saved with {unlike(str(saved), description)}, and this is "
            f"{unlike(description, str(saved))}; attach what it was saved with, or take out its entry 'sync' if the "
            'change is meant: load_state_dict(state | {"sync": None})'
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
"""The names of methods, by the class names that older states have in their place."""


def renamed(sync: object) -> object:
    """A saved description of a sync, with the method's present name.

    >>> renamed("AttachedSharded: fp32; every_steps=5")
    'local_update, sharded: fp32; every_steps=5'
    """
    if not isinstance(sync, str):
        return sync
    name, colon, rest = sync.partition(":")
    return EARLIER.get(name, name) + colon + rest


def without_stages(sync: str) -> str:
    """A description of a sync without the stages of DGC's warm-up: what it keeps fits any of them.

    >>> without_stages("every_step: topk(0.25), MomentumCorrection(0.9); topk(0.01), MomentumCorrection(0.9); H=5")
    'every_step: topk(0.01), MomentumCorrection(0.9); H=5'
    """
    name, colon, settings = sync.partition(": ")
    stages = [setting for setting in settings.split("; ") if "MomentumCorrection" in setting]
    others = [setting for setting in settings.split("; ") if "MomentumCorrection" not in setting]
    return name + colon + "; ".join([*stages[-1:], *others])


def unlike(description: str, reference: str) -> str:
    """The settings in ``description`` (see `context.description`) that are not in ``reference``.

    >>> unlike("diloco: fp32; every_steps=5; mix=0.0", "diloco: fp32; every_steps=6; mix=0.0")
    'every_steps=5'
    """
    shared = reference.split("; ")
    return "; ".join(setting for setting in description.split("; ") if setting not in shared) or "nothing else"


def tensors_of(
    entries: Mapping[str, object], kinds: Mapping[str, Kind], segments: Mapping[str, Segment], always: Sequence[str]
) -> Tensors:
    """The tensors of a state, checked to be complete and to fit this sync.

    ``always``: names that every parameter has from the first step on. Raises ``ValueError`` for missing and unknown
    tensors, and for another shape or dtype.
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
    listed, held = entries.get("holds"), holdings(tensors)
    if isinstance(listed, Mapping) and dict(listed) != held:
        expected = {str(name): str(kind) for name, kind in listed.items()}
        wrong = sorted({*expected.items()} ^ {*held.items()}) or [("its list", "no text")]
        lost, first = sorted({*expected} - {*held}), wrong[0][0]
        problem = f"{len(lost)} of them are missing ({lost[0]})" if lost else (
            f"{first}: {held.get(first, 'not there')}, was {expected.get(first, 'not there')}"
        )  # fmt: skip
        raise ValueError(
            f"this state says that it holds {len(listed)} tensors, and {problem}. Whatever saved or loaded it has "
            "changed it; load the state as a whole, as it was given"
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


def _require_piece(tensor: Tensor, segment: Segment | None, name: str) -> None:
    if segment is None:
        raise ValueError(f"the state to load holds {name}, of which this rank trains nothing; attach the same model")
    if tensor.shape != (segment.numel,) or tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the state to load holds {name} as {tensor.dtype} {list(tensor.shape)}, and this rank has "
            f"{segment.numel} elements of it, whose state is flat and fp32 (fp64 for a model in fp64)"
        )


def numbers_of(entries: Mapping[str, object], counters: tuple[str, ...], current: Mapping[str, float]) -> Numbers:
    """The numbers of a state, checked. ``current``: those of the sync that is to load it.

    Raises ``ValueError`` for what is not a finite number, for anything but an integer where ``current`` has one, and
    for ``counters`` below 0.
    """
    numbers = entries["numbers"] if "numbers" in entries else numbers_of_integers(entries["integers"])
    assert isinstance(numbers, Mapping)
    for name, value in numbers.items():
        integer = isinstance(value, int) and not isinstance(value, bool)
        if (integer and not -LARGEST <= value < LARGEST) or (not integer and isinstance(current.get(name), int)):
            raise ValueError(f"{name} of the state to load is {value!r}; it is an integer of 64 bits")
        if not integer and not (isinstance(value, float) and math.isfinite(value)):
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
"""Floats that revisions up to 24836cf kept as the integers of their bits."""


def numbers_of_integers(integers: object) -> object:
    """The numbers of a state or checkpoint from the time when both held integers only.

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
