"""What worker processes have imported when they start: torch, and what its optimizers and FSDP would load later."""

import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import dtrain.train.trainer  # noqa: F401
