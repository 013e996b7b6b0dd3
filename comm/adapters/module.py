"""Adapts a plain module, whose parameters every rank holds whole, for local updates.

Within a round of a local update replicas exchange nothing, so the model needs no wrapper: each rank is a replica, and
steps from its own gradients. Methods that exchange gradients need DistributedDataParallel
(`dtrain.comm.adapters.ddp`, which builds on this), whose buckets are exchanged during the backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.comm.adapters.optimizer import (
    StepGuard,
    elementwise_state,
    is_scalar,
    load_elementwise_state,
    load_local_snapshot,
    local_snapshot,
)
from dtrain.comm.adapters.requirements import sparse_modules
from dtrain.comm.adapters.trained_parameters import Trained
from dtrain.comm.adapters.whole_matrices import require_same_parts, share_matrices, unshare_matrices
from dtrain.comm.channel import Channel
from dtrain.comm.inner_optimizers.muon import MatrixPiece
from dtrain.comm.layout import Named, Segment, copied, even_slice, from_rows, is_finite, working
from dtrain.comm.ops import AllGather, Flow, Place
from dtrain.comm.pieces import Exchange, Private
from dtrain.comm.torch_private import stored_values


class ModulePieces:
    """Pieces of ``module``. Over a shard axis of several members, each owns its slice of every parameter."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, channel: Channel) -> None:
        self.optimizer, self.channel = optimizer, channel
        self.shard = channel.places["shard"]
        self.trained = Trained(module, optimizer)
        named = self.trained.parameters
        self.parameters = {name: p for name, p in named.items() if p.numel()}
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.held = {name: Segment(name, 0, p.numel()) for name, p in self.parameters.items()}
        rank, size = self.shard.rank, self.shard.size
        slices = (even_slice(name, p.numel(), part=rank, parts=size) for name, p in self.parameters.items())
        self.segments = {segment.fqn: segment for segment in slices if segment.numel}
        self._sparse = sparse_modules(module)
        self._private: Exchange | None = None
        self._exchanged = False  # whether the private exchange has run in this step
        self.guard = StepGuard(optimizer)
        pieces = {p: [MatrixPiece(tuple(p.shape), self.held[name])] for name, p in self.parameters.items()}
        share_matrices(optimizer, channel, pieces, whole=True)
        self.trained.claim()

    @property
    def place(self) -> Place:
        return self.channel.places["replicate"]

    def read(self, fqns: Collection[str] | None = None, *, copy: bool = True) -> dict[str, Tensor]:
        names = [fqn for fqn in self.segments if fqns is None or fqn in fqns]
        values = {fqn: self._own_slice(fqn, self.parameters[fqn].detach()) for fqn in names}
        return copied(values) if copy else values

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        names = [fqn for fqn in self.parameters if fqns is None or fqn in fqns]
        whole = values
        if self.shard.size > 1:
            whole = self.channel.run(self._gather(values, names), "write-back")
        with torch.no_grad(), self.trained.writing():
            for fqn in names:
                self.parameters[fqn].copy_(whole[fqn].view(self.shapes[fqn]))

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        if isinstance(exchange, Private) and exchange.private:
            self._private = exchange
        elif exchange is not None:
            raise TypeError(
                "this sync exchanges gradients, and a plain module does not provide them during the backward "
                "pass; wrap it in DistributedDataParallel or fully_shard. Local updates take it as it is, if they have "
                "no warmup_steps, which are data parallelism"
            )

    def finish(self) -> None:
        self.trained.require_unchanged()
        if self._private is None or self._exchanged:
            return
        gradients = {fqn: p.grad for fqn, p in self.parameters.items() if p.grad is not None}
        flat = {fqn: working(gradient.reshape(-1)) for fqn, gradient in gradients.items()}
        for fqn, value in self.channel.run(self._private(flat), "gradients").values.items():
            gradients[fqn].copy_(value.view(gradients[fqn].shape))
        self._exchanged = True

    def gradients_finite(self) -> bool:
        grads = (p.grad for p in self.parameters.values() if p.grad is not None)
        return is_finite(*(stored_values(grad) if grad.is_sparse else grad for grad in grads))

    def unused(self) -> set[str]:
        return {fqn for fqn in self.segments if self.parameters[fqn].grad is None}

    def step(self) -> None:
        with self.guard.opened(), self.trained.stepping():
            self.optimizer.step()
        self._exchanged = False
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self._exchanged = False
        self.trained.clear()

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        whole = elementwise_state(self.optimizer, self.parameters, lambda tensor: tensor)
        owned: dict[str, dict[str, Tensor]] = {}
        for name, tensors in whole.items():
            present = {fqn: tensor for fqn, tensor in tensors.items() if fqn in self.segments}
            owned[name] = {fqn: t if is_scalar(t) else self._own_slice(fqn, t) for fqn, t in present.items()}
        return owned

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        require_same_parts(self.optimizer, optimizer, self.parameters)
        with torch.no_grad(), self.trained.writing():
            for fqn, value in parameters.items():
                self.parameters[fqn].copy_(value.view(self.shapes[fqn]))
        load_elementwise_state(self.optimizer, self.parameters, optimizer, lambda value, p: value.view(p.shape))

    def optimizer_snapshot(self) -> dict[str, Any]:
        return local_snapshot(self.optimizer)

    def load_optimizer_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        load_local_snapshot(self.optimizer, snapshot)

    def detach(self) -> None:
        self.guard.remove()
        unshare_matrices(self.optimizer)
        self.trained.release()

    def _gather(self, slices: Mapping[str, Tensor], fqns: list[str]) -> Flow[dict[str, Tensor]]:
        """Whole flat tensors of ``fqns`` from every member's slices, across the shard axis."""
        if self.shard.size == 1:
            return {fqn: slices[fqn] for fqn in fqns}
        padded = []
        for fqn in fqns:
            width = -(-self.held[fqn].numel // self.shard.size)
            row = working(self.parameters[fqn].detach().new_zeros(width))
            if fqn in slices:
                row[: slices[fqn].numel()] = slices[fqn]
            padded.append(row)
        gathered = yield AllGather(tuple(padded), axis="shard")
        return {fqn: from_rows(rows, self.held[fqn].numel) for fqn, rows in zip(fqns, gathered, strict=True)}

    def _own_slice(self, fqn: str, tensor: Tensor) -> Tensor:
        segment = self.segments[fqn]
        return working(tensor.reshape(-1)[segment.offset : segment.stop])
