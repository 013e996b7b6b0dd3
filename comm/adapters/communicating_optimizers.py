"""Whether an inner optimizer communicates: under a local update it must not, or it would keep the replicas equal.

Those that are known are refused by name, at attach. Others are noticed in their first step, as process groups count
their collectives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

KNOWN = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")
"""Optimizers, or what they are derived from, that send something in every step or some."""


def require_silent(optimizer: object) -> None:
    """Raise ``ValueError`` for an optimizer that is known to communicate."""
    if any(owner.__name__ in KNOWN for owner in type(optimizer).__mro__):
        raise ValueError(_said(optimizer))


class Listening:
    """Notices an optimizer that sends something to ranks outside of ``replica``, once, in its first step."""

    def __init__(self, optimizer: torch.optim.Optimizer, replica: Collection[int]) -> None:
        self._optimizer, self._replica = optimizer, set(replica)
        self._done = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Around a step. Raises ``RuntimeError`` behind it."""
        if self._done:
            yield
            return
        before = self._asked()
        yield
        self._done = True
        if self._asked() != before:
            raise RuntimeError(_said(self._optimizer))

    def _asked(self) -> dict[str, int]:
        """How many collectives each group has begun that reaches beyond the replica."""
        beyond = [
            group
            for group in dist.distributed_c10d._world.pg_map
            if group.rank() >= 0 and not self._replica.issuperset(dist.get_process_group_ranks(group))
        ]
        return {group.group_name: _begun(group) for group in beyond}


def _begun(group: dist.ProcessGroup) -> int:
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]  # it has, since torch 1.10


def _said(optimizer: object) -> str:
    return (
        f"{type(optimizer).__name__} communicates by itself, in steps in which a local update leaves replicas to "
        "themselves; give attach an optimizer that only steps, such as the one that it wraps (with fully_shard or "
        "DeepSpeed its state is sharded within a replica), or use every_step(...)"
    )
