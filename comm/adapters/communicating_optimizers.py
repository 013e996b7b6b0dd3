"""Whether an inner optimizer communicates: under a local update it must not, or it would keep the replicas equal.

Known ones are refused by name, at attach. Others are detected in their first step, as process groups count their
collectives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dtrain.comm.torch_private import collectives_begun, open_groups

KNOWN = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")
"""Optimizers, or base classes of them, that communicate in some steps."""


def require_silent(optimizer: object) -> None:
    """Raise ``ValueError`` for an optimizer that is known to communicate."""
    if any(owner.__name__ in KNOWN for owner in type(optimizer).__mro__):
        raise ValueError(_refusal(optimizer))


class Listening:
    """Detects an optimizer that communicates with ranks outside of ``replica``, once, in its first step."""

    def __init__(self, optimizer: torch.optim.Optimizer, replica: Collection[int]) -> None:
        self._optimizer, self._replica = optimizer, set(replica)
        self._done = False

    @contextmanager
    def checked(self) -> Iterator[None]:
        """A context for a step. Raises ``RuntimeError`` at its end."""
        if self._done:
            yield
            return
        before = self._counts()
        yield
        self._done = True
        if self._counts() != before:
            raise RuntimeError(_refusal(self._optimizer))

    def _counts(self) -> dict[str, int]:
        """The number of collectives begun by each group that reaches beyond the replica."""
        beyond = [
            group
            for group in open_groups()
            if group.rank() >= 0 and not self._replica.issuperset(dist.get_process_group_ranks(group))
        ]
        return {group.group_name: collectives_begun(group) for group in beyond}


def _refusal(optimizer: object) -> str:
    return (
        f"{type(optimizer).__name__} communicates in its steps, and within a round of a local update replicas "
        "do not; give attach an optimizer that only steps, such as the one that it wraps (with fully_shard or "
        "DeepSpeed its state is sharded within a replica), or use every_step(...)"
    )
