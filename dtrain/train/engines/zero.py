"""DeepSpeed ZeRO 1, 2 and 3 on the shard axis; ``mpu`` makes one replica its data-parallel world."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.comm.adapters.adapter import pieces_of
from dtrain.comm.torch_private import clear_forward_hooks
from dtrain.comm.transports.groups import kept_group
from dtrain.train.engines.contract import loss_of
from dtrain.train.engines.engine import Batch, Engine, EngineOptions, OptimizerFactory, checkpoint_activations
from dtrain.train.mesh import Mesh


class _ShardAxisOnly:
    """The ``mpu`` that DeepSpeed asks for its groups: data parallelism is the replica, model parallelism nothing."""

    def __init__(self, replica: dist.ProcessGroup, alone: dist.ProcessGroup) -> None:
        self.replica, self.alone = replica, alone

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.replica

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.replica)

    def get_data_parallel_world_size(self) -> int:
        return self.replica.size()

    def get_data_parallel_rank(self) -> int:
        return self.replica.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


class ZeroEngine(Engine):
    """See the module's docstring. Clipping happens inside DeepSpeed's step, by the norm over the replica."""

    def __init__(
        self, model: nn.Module, optimizer: OptimizerFactory, mesh: Mesh, options: EngineOptions, stage: int
    ) -> None:
        self.mesh, self.options = mesh, options
        deepspeed = _deepspeed()
        if options.activation_checkpointing:
            # Stage 3 frees a gathered parameter after use, which the non-reentrant form takes for a changed tensor.
            checkpoint_activations(model, reentrant=stage == 3)
        alone = kept_group([mesh.rank])
        self.deepspeed, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer(model),
            mpu=_ShardAxisOnly(mesh.engine_group, alone),
            dist_init_required=False,
            config=_config(options, stage),
        )
        self.pieces = pieces_of(self.deepspeed, None, mesh.channel, overlap=True)

    def forward_backward(self, microbatches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), device=self.mesh.device)
        for index, batch in enumerate(microbatches):
            loss = loss_of(self.deepspeed, batch)
            self.deepspeed.backward(loss)
            if index < len(microbatches) - 1:
                self.deepspeed.step()  # not a boundary: only counts the microbatch
            total += loss.detach().float() / len(microbatches)
        return total

    def clip(self) -> None:
        pass  # DeepSpeed clips in its step

    def evaluate(self, batch: Batch) -> Tensor:
        self.deepspeed.eval()
        with torch.no_grad():
            loss = loss_of(self.deepspeed, batch)
        self.deepspeed.train()
        return loss.float()

    def set_learning_rate(self, value: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = value

    def close(self) -> None:
        self.deepspeed.destroy()
        for module in self.deepspeed.module.modules():
            _forget_deepspeed(module)

    @property
    def gradient_norm(self) -> float:
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    @gradient_norm.setter
    def gradient_norm(self, value: float) -> None:
        pass  # DeepSpeed keeps it


zero1, zero2, zero3 = (partial(ZeroEngine, stage=stage) for stage in (1, 2, 3))


def _forget_deepspeed(module: nn.Module) -> None:
    """Cut a module's references to its engine and groups, whose threads wake a hundred times a second under gloo.

    With DeepSpeed 0.19 and torch 2.13 the model of stage 3 is never freed: ``gc`` does not see what holds it.
    """
    clear_forward_hooks(module)
    for name in ("pre_bwd_fn", "post_bwd_fn"):
        vars(module).pop(name, None)
    for parameter in module.parameters(recurse=False):
        vars(parameter).clear()


def _config(options: EngineOptions, stage: int) -> dict[str, object]:
    elements = max(1, int(options.bucket_mib * 2**20 / 8)) * 2  # DeepSpeed insists on an even number
    zero: dict[str, object] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": options.microbatch_size,
        "gradient_accumulation_steps": options.microbatches,
        "gradient_clipping": options.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if options.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if stage > 1:  # in stage 1 this would select BF16_Optimizer, whose norm ignores replaced gradients
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _deepspeed() -> Any:
    try:
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops
    except ImportError as error:
        raise ImportError("engine zero1, zero2 and zero3 need DeepSpeed; install dtrain[zero]") from error
    # This op would be compiled for a minute, and would carry small collectives past gloo, unseen by any meter.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
