"""The default process group of a program that may or may not have one, and what its ranks make themselves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from dtrain.comm.torch_private import HashStore
from dtrain.launchers import rendezvous as meeting
from dtrain.launchers.probe import await_gloo_threads
from dtrain.train.mesh import own_device, patience

__all__ = ["joined", "make_equal"]

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """(rank, world) of the default process group: the one that exists, torchrun's, or one of this process alone.

    One that exists is left as it is, any other is destroyed at the end of the block.
    """
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    backend = "nccl" if own_device().type == "cuda" else "gloo"
    alone = "RANK" not in os.environ or "WORLD_SIZE" not in os.environ
    if alone:
        before = {name: os.environ.get(name) for name in ALONE}
        os.environ.update(ALONE)  # DeepSpeed looks there
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        before = {}
        dist.init_process_group(backend, timeout=patience(backend), **meeting.of_environment())
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
        await_gloo_threads()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def make_equal(model: nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers: each has made the model itself."""
    if dist.get_world_size() == 1:
        return
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            sent = tensor.detach().to(device).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)
