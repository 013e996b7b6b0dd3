"""DistributedDataParallel inside a replica: every rank holds all parameters, and exchanges a slice with its peers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.adapters.adapter import pieces_of
from dtrain.train.engines.contract import loss_of, unused
from dtrain.train.engines.engine import Batch, EngineOptions, OptimizerFactory, TorchEngine, checkpoint_activations
from dtrain.train.mesh import Mesh


class DDPEngine(TorchEngine):
    """See the module's docstring."""

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory, mesh: Mesh, options: EngineOptions) -> None:
        super().__init__(mesh, options)
        model = model.to(mesh.device)
        if options.activation_checkpointing:
            checkpoint_activations(model)
        if options.unused_parameters:
            _use_all(model)
        self.ddp = DistributedDataParallel(
            model, process_group=mesh.engine_group, bucket_cap_mb=options.bucket_mib, gradient_as_bucket_view=True,
            # It also keeps DDP from rebuilding its buckets in the order of this replica's gradients.
            find_unused_parameters=options.unused_parameters,
        )  # fmt: skip
        self.model = self.ddp
        self.optimizer = optimizer(model)
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
        if self.ddp.require_backward_grad_sync and not self.options.unused_parameters:
            # DDP would wait for them with their whole bucket until the next forward pass.
            names = [name for name, p in self.ddp.module.named_parameters() if p.requires_grad and p.grad is None]
            if names:
                raise unused(names)
        return total

    def evaluate(self, batch: Batch) -> Tensor:
        self.ddp.eval()
        with torch.no_grad(), self._autocast():
            loss = loss_of(self.ddp.module, batch)  # not through DDP: it may broadcast buffers
        self.ddp.train()
        return loss.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")


def _use_all(model: nn.Module) -> None:
    """Add a zero of every parameter to the loss: DDP's own search misses those that only other replicas used."""
    forward = model.forward

    def with_all(batch: Batch) -> object:
        loss = forward(batch)
        if not isinstance(loss, Tensor) or loss.dim() or not torch.is_grad_enabled():
            return loss  # `loss_of` checks it
        nothing = [p.reshape(-1)[:0].sum().float() for p in model.parameters() if p.requires_grad]
        return loss + torch.stack(nothing).sum()

    model.forward = with_all
