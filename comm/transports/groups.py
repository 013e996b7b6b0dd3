"""Process groups that only their ranks create, with the default group's timeout, and that can be freed.

Only the ranks of a group call `own_group`. torch names such groups by how many groups a process has, which need not be
the same on all ranks, and which repeats once one was freed: the next would read the last one's addresses. Here groups
are counted for each set of ranks.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist

from dtrain.comm import torch_private
from dtrain.comm.torch_private import default_group, destroy_group, open_groups, timeout_of

__all__ = ["free", "kept_group", "own_group", "timeout_of"]

_made: WeakKeyDictionary[dist.ProcessGroup, Counter[tuple[int, ...]]] = WeakKeyDictionary()
"""For each default group: how many groups of these ranks were made."""
_kept: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()
"""For each default group: the groups that live as long as it does."""


def own_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """A new group of ``ranks``; each of them calls it, as often and in the same order as the others.

    ``backend``: the default group's by default, as its time-out is always.
    """
    default, members = default_group(), tuple(sorted(ranks))
    counts = _made.setdefault(default, Counter())
    counts[members] += 1
    name = f"dtrain {counts[members]} of {' '.join(map(str, members))}"
    return torch_private.own_group(name, members, backend, timeout_of(default))


def kept_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """One group of ``ranks``, used by one user at a time; created by all of them at the first call, and never freed.

    For engines: torch caches device meshes with their groups' names, and takes equal ones for the same.
    """
    groups, members = _kept.setdefault(default_group(), {}), tuple(sorted(ranks))
    if members not in groups:
        groups[members] = own_group(members)
    return groups[members]


def free(group: dist.ProcessGroup) -> None:
    """End the threads and close the connections of ``group``; nothing is under way in it. All its ranks call it.

    With gloo ranks do not wait for each other; with NCCL they do, and must free several groups in the same order.
    A group that was destroyed with the default one is left alone.
    """
    if group in open_groups():
        destroy_group(group)
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # glibc keeps the memory of a group's threads in arenas that the next group's do not use
