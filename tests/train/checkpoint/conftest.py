"""A small run whose values say by themselves which replica and step they belong to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtrain.comm.layout import even_slice
from dtrain.train.checkpoint.state import RankState
from tests.fakes.checkpoint_threads import write_together

SHAPES = {"a.weight": (3, 2), "b.bias": (5,)}
NUMEL = {"a.weight": 6, "b.bias": 5}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(step, keep=2, resumed_from=None, replicas=2, shards=2, anchor=False) writes into tmp_path."""

    def saved(
        step: int,
        *,
        keep: int = 2,
        resumed_from: Path | None = None,
        replicas: int = 2,
        shards: int = 2,
        anchor: bool = False,
    ) -> Path:
        states = []
        for rank in range(replicas * shards):
            replica, shard = divmod(rank, shards)
            segments = {fqn: even_slice(fqn, numel, part=shard, parts=shards) for fqn, numel in NUMEL.items()}

            def cut(value: float, segments=segments):  # type: ignore[no-untyped-def]
                return {
                    fqn: (torch.arange(NUMEL[fqn]) + value)[part.offset : part.stop] for fqn, part in segments.items()
                }

            state = RankState(
                segments=segments,
                sections={"parameters": cut(100.0 * step + 0.5 * replica)},
                kinds={"parameters": "per_worker"},
                numbers={"step": step},
                buffers={"bn.mean": torch.tensor([1.0 * replica])},
            )
            if anchor:
                state.sections["sync.anchor"] = cut(-100.0 * step)
                state.kinds["sync.anchor"] = "replicated"
            states.append(state)
        return write_together(
            tmp_path, step=step, states=states, shards=shards, shapes=SHAPES, keep=keep, resumed_from=resumed_from
        )

    return saved
