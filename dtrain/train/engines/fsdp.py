"""FSDP2 on the shard axis: each block is a unit, the rest is the root; it never communicates between replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dtrain.comm.adapters.adapter import pieces_of
from dtrain.comm.blocks import blocks_of
from dtrain.comm.torch_private import zeros_of_unused
from dtrain.errors import ModelError
from dtrain.train.engines.contract import loss_of, unused
from dtrain.train.engines.engine import (
    Batch,
    EngineOptions,
    OptimizerFactory,
    TorchEngine,
    checkpoint_activations,
)
from dtrain.train.mesh import Mesh


class FSDPEngine(TorchEngine):
    """See the module's docstring. In bf16 parameters are gathered as bf16; gradients are reduced and kept in fp32."""

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory, mesh: Mesh, options: EngineOptions) -> None:
        super().__init__(mesh, options)
        model = model.to(mesh.device)
        if options.activation_checkpointing:
            checkpoint_activations(model)
        policy = MixedPrecisionPolicy()
        if options.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard_mesh = mesh.shard_mesh()
        for block in blocks_of(model):
            fully_shard(block, mesh=shard_mesh, mp_policy=policy)
        fully_shard(model, mesh=shard_mesh, mp_policy=policy)
        self.model = model
        self.root = cast(FSDPModule, model)
        try:
            zeros_of_unused(self.root, options.unused_parameters)
        except RuntimeError as error:
            raise ModelError(f"engine.unused_parameters=true with engine=fsdp: {error}") from error
        self.optimizer = optimizer(model)
        self.pieces = pieces_of(model, self.optimizer, mesh.channel, overlap=True)

    def forward_backward(self, microbatches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), device=self.mesh.device)
        for index, batch in enumerate(microbatches):
            self.root.set_requires_gradient_sync(index == len(microbatches) - 1)
            loss = loss_of(self.model, batch)
            try:
                (loss / len(microbatches)).backward()
            except RuntimeError as error:
                if "set_reduce_scatter_unused_params" in str(error):
                    raise unused([]) from error
                raise
            total += loss.detach().float() / len(microbatches)
        return total
