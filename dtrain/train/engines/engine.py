"""The interface of engines, and what all of them share.

An engine owns the shard axis: it builds the model on its replica's ranks, runs forward and backward, clips by the norm
over its shards, and hands its `Pieces` to the sync. It never communicates with other replicas.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.comm.blocks import blocks_of
from dtrain.comm.pieces import Pieces
from dtrain.errors import ModelError
from dtrain.train.engines.contract import loss_of
from dtrain.train.mesh import Mesh

Batch: TypeAlias = Mapping[str, Tensor]
OptimizerFactory: TypeAlias = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of every engine.

    ``precision``: "fp32", or "bf16" with fp32 master parameters and fp32 reductions where the engine can.
    ``bucket_mib``: size of the gradient buckets. ``clip_norm``: 0 leaves gradients as they are. ``unused_parameters``:
    a parameter that does not contribute to a loss has the gradient zero.
    """

    precision: str
    activation_checkpointing: bool
    bucket_mib: float
    clip_norm: float
    microbatches: int
    microbatch_size: int
    unused_parameters: bool = False


class Engine(Protocol):
    """A model under training on one rank. ``gradient_norm``: that of the last step, from `clip` on."""

    pieces: Pieces
    options: EngineOptions
    gradient_norm: float

    @abstractmethod
    def forward_backward(self, microbatches: Sequence[Batch]) -> Tensor:
        """Accumulate the gradient of the mean loss over the microbatches of this rank; the detached mean loss."""

    @abstractmethod
    def clip(self) -> None:
        """Clip by the norm over this replica's shards and note it in ``gradient_norm``. After `Pieces.finish`."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> Tensor:
        """The loss of a batch, without gradients."""

    @abstractmethod
    def set_learning_rate(self, value: float) -> None:
        """For all parameter groups, from the next step on."""

    @abstractmethod
    def close(self) -> None:
        """Free what would keep the process group busy."""


class TorchEngine(Engine):
    """What DDP and FSDP2 share: a module that is called, and a torch optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, mesh: Mesh, options: EngineOptions) -> None:
        self.mesh, self.options = mesh, options
        self.gradient_norm = 0.0

    def clip(self) -> None:
        limit = self.options.clip_norm if self.options.clip_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        whole = norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
        self.gradient_norm = float(whole)

    def evaluate(self, batch: Batch) -> Tensor:
        self.model.eval()
        with torch.no_grad(), self._autocast():
            loss = loss_of(self.model, batch)
        self.model.train()
        return loss.float()

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def close(self) -> None:
        """Nothing to free."""

    def _autocast(self) -> torch.autocast:
        """FSDP2 and DeepSpeed cast by themselves; DDP needs autocast for bf16."""
        return torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=False)


def checkpoint_activations(model: nn.Module, *, reentrant: bool = False) -> None:
    """Recompute each block's activations in backward instead of keeping them. Names of parameters stay as they are."""
    for block in blocks_of(model):
        recomputed = functools.partial(_reentrant, block.forward) if reentrant else None
        block.forward = recomputed or functools.partial(checkpoint, block.forward, use_reentrant=False)


def _reentrant(forward: Callable[..., object], *inputs: object, **settings: object) -> object:
    """The reentrant form takes no keywords, and gives what is not an argument no gradient.

    Raises ``ModelError`` for a keyword that needs one; masks and positions do not.
    """
    for name, value in settings.items():
        held = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in held):
            raise ModelError(
                f"a block is given {name} by keyword, where recomputed activations of zero3 lose its gradient: give it "
                "by position, or set engine.activation_checkpointing=false"
            )
    return checkpoint(functools.partial(forward, **settings), *inputs, use_reentrant=True)
