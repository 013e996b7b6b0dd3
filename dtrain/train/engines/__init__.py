"""Engines, which own the shard axis: DDP, FSDP2, and DeepSpeed ZeRO 1, 2 and 3."""

from __future__ import annotations

from torch import nn

from dtrain.train.engine_registry import builder
from dtrain.train.engines.engine import Batch, Engine, EngineOptions, OptimizerFactory
from dtrain.train.mesh import Mesh

__all__ = ["Batch", "Engine", "EngineOptions", "build_engine"]


def build_engine(
    name: str, model: nn.Module, optimizer: OptimizerFactory, mesh: Mesh, options: EngineOptions
) -> Engine:
    """Build engine ``name`` on this rank; collective in each replica. Raises ``ValueError`` for an unknown name."""
    return builder(name)(model, optimizer, mesh, options)
