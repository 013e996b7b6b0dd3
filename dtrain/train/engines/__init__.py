"""Engines: who owns the shard axis. DDP, FSDP2, and DeepSpeed ZeRO 1, 2 and 3."""

from __future__ import annotations

from torch import nn

from dtrain.train.engines.engine import Batch, Engine, EngineOptions, OptimizerFactory
from dtrain.train.mesh import Mesh

NAMES = ("ddp", "fsdp", "zero1", "zero2", "zero3")

__all__ = ["NAMES", "Batch", "Engine", "EngineOptions", "build_engine"]


def build_engine(
    name: str, model: nn.Module, optimizer: OptimizerFactory, mesh: Mesh, options: EngineOptions
) -> Engine:
    """Build engine ``name`` on this rank; collective in each replica. Raises ``ValueError`` for an unknown name."""
    match name:
        case "ddp":
            from dtrain.train.engines.ddp import DDPEngine

            return DDPEngine(model, optimizer, mesh, options)
        case "fsdp":
            from dtrain.train.engines.fsdp import FSDPEngine

            return FSDPEngine(model, optimizer, mesh, options)
        case "zero1" | "zero2" | "zero3":
            from dtrain.train.engines.zero import ZeroEngine

            return ZeroEngine(model, optimizer, mesh, options, stage=int(name[-1]))
        case _:
            raise ValueError(f"engine is {name!r}; choose one of {', '.join(NAMES)}")
