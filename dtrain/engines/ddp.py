"""DistributedDataParallel inside a replica: every rank holds everything, and its peers share its slice of the sync."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.attach import pieces_of
from dtrain.engines.base import Batch, EngineOptions, OptimizerFactory, TorchEngine, checkpoint_activations
from dtrain.engines.contract import loss_of
from dtrain.mesh import Mesh


class DDPEngine(TorchEngine):
    """See the module's docstring."""

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory, mesh: Mesh, options: EngineOptions) -> None:
        super().__init__(mesh, options)
        model = model.to(mesh.device)
        if options.activation_checkpointing:
            checkpoint_activations(model)
        self.ddp = DistributedDataParallel(
            model, process_group=mesh.engine_group, bucket_cap_mb=options.bucket_mib, gradient_as_bucket_view=True
        )
        self.model = self.ddp
        self.optimizer = optimizer(model.parameters())
        self.pieces = pieces_of(self.ddp, self.optimizer, mesh.channel, overlap=True)

    def forward_backward(self, microbatches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), device=self.mesh.device)
        for index, batch in enumerate(microbatches):
            last = index == len(microbatches) - 1
            with nullcontext() if last else self.ddp.no_sync():
                with self._autocast():
                    loss = loss_of(self.ddp, batch)
                (loss / len(microbatches)).backward()
            total += loss.detach().float() / len(microbatches)
        return total

    def evaluate(self, batch: Batch) -> Tensor:
        self.ddp.eval()
        with torch.no_grad(), self._autocast():
            loss = loss_of(self.ddp.module, batch)  # not through DDP: it may broadcast buffers
        self.ddp.train()
        return loss.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")
