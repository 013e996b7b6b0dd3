"""What the worker processes of the tests on a card run: several ranks, all on the one card."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from dtrain.comm.channel import Channel
from dtrain.comm.ops import Flow, Op, Payload
from dtrain.testing import WorkerPool
from tests.gpu.card import DEVICE

R = TypeVar("R")


def on_card(backend: str, function: Callable[..., R], *arguments: object) -> R:
    """``function(*arguments)`` on a rank whose default group is of ``backend``, with the card as its device.

    NCCL refuses two ranks on one card of one host, so each is told that its host is another one.
    """
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    if backend == "nccl":
        os.environ.update(
            NCCL_HOSTID=f"rank-{dist.get_rank()}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", NCCL_NET="Socket",
            NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1",
        )  # fmt: skip
        rank, world = dist.get_rank(), dist.get_world_size()
        store = PrefixStore("card", dist.distributed_c10d._get_default_store())
        dist.destroy_process_group()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return function(*arguments)


def between_ranks(workers: WorkerPool, world: int) -> str:
    """Whether ``world`` ranks on one card form a group of NCCL that computes: "" or why not."""
    if DEVICE != "cuda":
        return "this is no card"
    try:
        found = workers.run(on_card, "nccl", summed, world=world, seconds=120)
    except (RuntimeError, TimeoutError) as error:
        return " ".join(str(error).split())[-600:]
    expected = float(sum(range(1, world + 1)))
    return "" if found == [expected] * world else f"the sum of {world} ranks is {found}, not {expected}"


def summed() -> float:
    """An all-reduce of this rank's number, from 1 on."""
    value = torch.full((1 << 20,), float(dist.get_rank() + 1), device=DEVICE)
    dist.all_reduce(value)
    return float(value.amax())


def seconds_of_all_reduce(megabytes: int, repeats: int) -> list[float]:
    """Of each of ``repeats`` all-reduces of the default group, on this rank."""
    value = torch.ones(megabytes * 1_000_000 // 4, device=DEVICE)
    dist.all_reduce(value)
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(value)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def slow(milliseconds: float) -> None:
    """Keep the current stream of the card busy for about so long; a processor has none."""
    if DEVICE == "cuda":
        torch.cuda._sleep(int(milliseconds * 1_500_000))  # cycles


def moved(value: object, device: str) -> object:
    """``value`` with all tensors in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    return {name: moved(item, device) for name, item in value.items()} if isinstance(value, dict) else value


def ops_there(rank: int, world: int, seed: int, layout: int) -> list[Op]:
    """Each op once, its tensors on the card."""
    from dataclasses import replace

    from tests.comm.transports.flows import LAYOUTS, ops_for

    ops = ops_for(rank, world, seed, LAYOUTS[layout])
    return [replace(op, payload=tuple(t.to(DEVICE) for t in op.payload)) for op in ops]


def all_ops(seed: int, layout: int, *, from_cpu: bool = False) -> list[Payload]:
    """The replies to all ops over a channel of the default group; on the CPU. ``from_cpu``: so are the payloads."""
    from tests.comm.transports.flows import LAYOUTS, ops_for

    world, rank = dist.get_world_size(), dist.get_rank()
    channel = Channel({"replicate": _group()})
    ops = ops_for(rank, world, seed, LAYOUTS[layout]) if from_cpu else ops_there(rank, world, seed, layout)
    handles = []
    for op in ops:
        slow(2)  # a message that did not wait for what computes it would be sent too early
        late = tuple(_late(tensor) for tensor in op.payload)
        handles.append(channel.start(_once(_with(op, late)), "x"))
    replies = []
    for handle, op in zip(handles, ops, strict=True):
        reply = handle.wait()
        assert all(tensor.device == op.payload[0].device for tensor in reply)
        replies.append(tuple(tensor.cpu() for tensor in reply))
    channel.close()
    return replies


def _with(op: Op, payload: Payload) -> Op:
    from dataclasses import replace

    return replace(op, payload=payload)


def _late(tensor: Tensor) -> Tensor:
    """A copy, of the same strides, that is computed by the current stream now."""
    copy = torch.empty_like(tensor, memory_format=torch.preserve_format)
    return copy.copy_(tensor)


def _once(op: Op) -> Flow[Payload]:
    return (yield op)


def _group() -> dist.ProcessGroup:
    group = dist.new_group(list(range(dist.get_world_size())))
    assert isinstance(group, dist.ProcessGroup)
    return group


def trained(words: list[str], folder: str, deterministic: bool = True) -> None:
    """One rank's part of a run as `dtrain train` makes it, in this process."""
    from dtrain.train.config import compose
    from dtrain.train.trainer import train

    if DEVICE == "cuda" and deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    train(compose([*words, f"run.dir={folder}"]))
