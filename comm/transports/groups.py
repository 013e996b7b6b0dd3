"""Process groups that only their ranks create, with the default group's timeout, and that can be freed.

Only the ranks of a group call `own_group`. torch names such groups by how many groups a process has, which need not be
the same on all ranks, and which repeats once one was freed: the next would read the last one's addresses. Here groups
are counted for each set of ranks.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_made: WeakKeyDictionary[dist.ProcessGroup, Counter[tuple[int, ...]]] = WeakKeyDictionary()
"""For each default group: how many groups of these ranks were made."""
_kept: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()
"""For each default group: the groups that live as long as it does."""


def own_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """A new group of ``ranks``; each of them calls it, as often and in the same order as the others.

    ``backend``: the default group's by default, as its time-out is always.
    """
    default, members = c10d._get_default_group(), tuple(sorted(ranks))
    counts = _made.setdefault(default, Counter())
    counts[members] += 1
    name = c10d.GroupName(f"dtrain {counts[members]} of {' '.join(map(str, members))}")
    default_name, store = c10d._world.pg_map[default]
    timeout = timeout_of(default)
    # A default group that is bound to a device would split its communicator, for which all of its ranks are needed.
    bound, default.bound_device_id = default.bound_device_id, None
    try:
        group, group_store = c10d._new_process_group_helper(
            len(members), members.index(dist.get_rank()), list(members), dist.Backend(backend or default_name), store,
            name, timeout=timeout, group_desc="dtrain",
        )  # fmt: skip
    finally:
        default.bound_device_id = bound
    c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(members)}
    assert isinstance(group, dist.ProcessGroup)
    # Wait until all have connected: a rank that frees the group earlier would break the others' connections.
    c10d._store_based_barrier(dist.get_rank(), group_store, name, len(members), timeout)
    return group


def kept_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """One group of ``ranks``, used by one user at a time; created by all of them at the first call, and never freed.

    For engines: torch caches device meshes with their groups' names, and takes equal ones for the same.
    """
    groups, members = _kept.setdefault(c10d._get_default_group(), {}), tuple(sorted(ranks))
    if members not in groups:
        groups[members] = own_group(members)
    return groups[members]


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of ``group`` waits."""
    backends = [group._get_backend(torch.device(device)) for device in group._device_types]
    timeouts = [backend.options._timeout for backend in backends if hasattr(backend, "options")]
    return max(timeouts, default=dist.default_pg_timeout)


def free(group: dist.ProcessGroup) -> None:
    """End the threads and close the connections of ``group``; nothing is under way in it. All its ranks call it.

    With gloo ranks do not wait for each other; with NCCL they do, and must free several groups in the same order.
    A group that was destroyed with the default one is left alone.
    """
    world = c10d._world
    if group in world.pg_map:
        tag = world.pg_to_tag.get(group, "")
        dist.destroy_process_group(group)
        if tag in world.tags_to_pg and not world.tags_to_pg[tag]:
            del world.tags_to_pg[tag]  # torch keeps the empty list of each group that there ever was
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # glibc keeps the memory of a group's threads in arenas that the next group's do not use
