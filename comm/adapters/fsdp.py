"""Adapts FSDP2 (`fully_shard`): gradients are exchanged unit by unit. Its mesh has a shard axis alone, or is made so.

FSDP2 reduce-scatters a unit's gradients over the shard axis and then calls the unit's all-reduce hook with this rank's
flat gradient, before it becomes ``p.grad``. The hook starts the exchange with the peers (`fsdp_units`). Where FSDP2
makes no copy after it (same dtype, no gradient yet), ``p.grad`` is a view of the hook's buffer, which the exchange may
fill later, during backward; otherwise the result is added.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.comm.adapters.fsdp_mesh import require_whole_replicas, reshard, to_native, to_shard_axis
from dtrain.comm.adapters.fsdp_units import Passes, units_of
from dtrain.comm.adapters.optimizer import (
    StepGuard,
    elementwise_state,
    load_elementwise_state,
    load_local_snapshot,
    local_snapshot,
)
from dtrain.comm.adapters.trained_parameters import Trained
from dtrain.comm.adapters.whole_matrices import require_same_parts, share_matrices, unshare_matrices
from dtrain.comm.channel import Channel
from dtrain.comm.inner_optimizers.muon import MatrixPiece
from dtrain.comm.layout import Named, Segment, copied, is_finite, working
from dtrain.comm.ops import Place
from dtrain.comm.pieces import Exchange


class FSDPPieces:
    """Pieces of an FSDP2 model.

    Args:
        model: the root; it and its units were given to ``fully_shard`` with a mesh of the shard axis, or of a replicate
            axis before it (native HSDP): see `fsdp_mesh`.
        overlap: overlap exchanges with backward. The caller then calls `finish` before it reads a gradient.

    Raises ``ValueError`` for tensor parallelism beside it, for several shard axes, and for shards along another dim
    than 0.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, channel: Channel, *, overlap: bool) -> None:
        self.model, self.optimizer, self.channel, self.overlap = model, optimizer, channel, overlap
        self.trained = Trained(model, optimizer, lambda: reshard(model))
        self.guard = StepGuard(optimizer)
        try:
            to_shard_axis(model, optimizer)
            require_whole_replicas(model, channel.places["shard"])
            self._adapt()
        except BaseException:
            self.guard.remove()
            to_native(model, optimizer)
            raise

    def _adapt(self) -> None:
        named = self.trained.parameters
        self.segments: dict[str, Segment] = {}
        self.parameters: dict[str, DTensor] = {}
        for fqn, parameter in named.items():
            segment = _segment(fqn, parameter)
            if segment.numel:
                self.segments[fqn] = segment
                self.parameters[fqn] = parameter  # type: ignore[assignment]
        self.held = self.segments
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self._passes: Passes | None = None
        pieces = {p: [MatrixPiece(tuple(p.shape), _segment(name, p))] for name, p in named.items()}
        share_matrices(self.optimizer, self.channel, pieces, whole=False)
        self.trained.claim()

    @property
    def place(self) -> Place:
        return self.channel.places["replicate"]

    def read(self, fqns: Collection[str] | None = None, *, copy: bool = True) -> dict[str, Tensor]:
        parameters = {fqn: p for fqn, p in self.parameters.items() if fqns is None or fqn in fqns}
        values = {fqn: working(_local(p.detach())) for fqn, p in parameters.items()}
        return copied(values) if copy else values

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        reshard(self.model)  # or a unit that is still gathered would keep the old values
        with torch.no_grad(), self.trained.writing():
            for fqn, value in values.items():
                _local(self.parameters[fqn].detach()).copy_(value)

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        if exchange is None:
            return
        assert isinstance(self.model, FSDPModule)  # `attach` ensures it
        units = units_of(self.model, self.segments)
        self._passes = Passes(self.model, units, exchange, self.channel, overlap=self.overlap)

    def finish(self) -> None:
        self.trained.require_unchanged()
        if self._passes is not None:
            self._passes.finish()
            self.trained.require_there(self._passes.with_gradient - set(self.trained.outside))

    def gradients_finite(self) -> bool:
        grads = [p.grad for p in self.parameters.values()]
        return is_finite(*(_local(g) for g in grads if g is not None))

    def unused(self) -> set[str]:
        exchanged = self._passes.with_gradient if self._passes is not None else set()
        # One whose gradient another optimizer has used and cleared was not unused.
        return {fqn for fqn, parameter in self.parameters.items() if parameter.grad is None and fqn not in exchanged}

    def step(self) -> None:
        with self.guard.opened(), self.trained.stepping():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._step_ended()

    def skip(self) -> None:
        self.trained.clear()
        self._step_ended()

    def _step_ended(self) -> None:
        if self._passes is not None:
            self._passes.step_ended()

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        return elementwise_state(self.optimizer, self.parameters, _local)

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        require_same_parts(self.optimizer, optimizer, self.parameters)
        self.write(parameters)
        load_elementwise_state(self.optimizer, self.parameters, optimizer, _like)

    def optimizer_snapshot(self) -> dict[str, Any]:
        return local_snapshot(self.optimizer)

    def load_optimizer_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        load_local_snapshot(self.optimizer, snapshot)

    def detach(self) -> None:
        self.guard.remove()
        unshare_matrices(self.optimizer)
        self.trained.release()
        if self._passes is not None:
            self._passes.detach()
        to_native(self.model, self.optimizer)


def _local(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.reshape(-1)


def _like(piece: Tensor, parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    local = piece.view(parameter.to_local().shape)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _segment(fqn: str, parameter: Tensor) -> Segment:
    """On a mesh of one axis. Rows of dim 0: FSDP2 gives ceil(rows / shards) to each rank until none are left."""
    if not isinstance(parameter, DTensor):
        raise ValueError(
            f"{fqn} is whole on every rank of a model that fully_shard has cut: it was among ignored_params, or came "
            "into the model later, so FSDP2 averages its gradient over no rank; leave ignored_params out, call "
            "fully_shard when the model is complete, or freeze it (requires_grad_(False))"
        )
    if len(parameter.placements) != 1 or not parameter.placements[0].is_shard(0):
        raise ValueError(f"{fqn} is placed as {parameter.placements}; dtrain follows Shard(0) only")
    rows = parameter.shape[0]
    width = -(-rows // parameter.device_mesh.size())
    begin = min(parameter.device_mesh.get_local_rank() * width, rows)
    row = parameter.numel() // max(rows, 1)
    return Segment(fqn, begin * row, parameter.to_local().numel())
