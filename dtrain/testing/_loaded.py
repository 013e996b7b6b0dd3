"""Preloaded in worker processes: torch, and what its optimizers, FSDP and DeepSpeed's engine would import later."""

import importlib.util

import torch._dynamo
import torch.distributed.fsdp

import dtrain.train.trainer  # noqa: F401

if importlib.util.find_spec("deepspeed") is not None:
    import torch._inductor.compile_fx  # noqa: F401
