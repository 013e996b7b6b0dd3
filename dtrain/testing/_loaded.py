"""Preloaded in worker processes: torch, and what its optimizers and FSDP would import later."""

import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import dtrain.train.trainer  # noqa: F401
