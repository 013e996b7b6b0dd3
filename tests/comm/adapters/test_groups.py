"""The groups that `attach` makes: whose they are, how long they wait, and that nothing of them is left."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, co2, diloco, every_step, local_sgd, streaming_diloco
from dtrain.comm.channel import Channel
from dtrain.comm.ops import AllToAll, Flow, Shift
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.groups import timeout_of
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.compress import error_feedback, quantize
from dtrain.launchers import probe
from dtrain.testing import WorkerPool
from dtrain.train.mesh import build_mesh
from tests.comm.adapters.test_attach import backward, flat, small

pytestmark = pytest.mark.processes


# ---- whose they are --------------------------------------------------------------------------------------------------


def trainers(case: str) -> list[float]:
    """Some of the ranks train; the others do not call `attach`. What each trainer holds after some steps."""
    rank = dist.get_rank()
    parts = {"plain": [[0, 2]], "ddp": [[1, 2]], "one": [[0, 1], [2]], "ddp in replicas": [[0], [2]]}[case]
    groups = [dist.new_group(ranks) for ranks in parts]
    mine = next((group for group, ranks in zip(groups, parts, strict=True) if rank in ranks), None)
    across = dist.new_group([0, 2]) if case == "ddp in replicas" else None
    if mine is None:
        return []
    model: nn.Module = small(seed=rank)
    if case != "plain":
        model = DistributedDataParallel(model, process_group=mine)
    spec = local_sgd(every_steps=2) if case == "plain" else every_step()
    group = across if case == "ddp in replicas" else mine
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), spec, replicate_group=group)
    for step in range(4):
        backward(model, rank, step)
        sync.step()
    sync.detach()
    return flat(model).tolist()


@pytest.mark.parametrize("case", ["plain", "ddp", "one", "ddp in replicas"])
def test_only_those_who_train_attach(pool: WorkerPool, case: str) -> None:
    found = [weights for weights in pool.run(trainers, case, world=3) if weights]
    assert len(found) == (3 if case == "one" else 2) and found[0] == found[1]
    assert case != "one" or found[2] != found[0]


def unequal() -> str:
    model = DistributedDataParallel(small())
    three, one = dist.new_group([0, 1, 2]), dist.new_group([3])
    group = three if dist.get_rank() < 3 else one
    try:
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step(), replicate_group=group)
    except ValueError as error:
        return str(error)
    return "attached"


def test_groups_that_do_not_cut_the_ranks_into_equal_parts_are_refused(pool: WorkerPool) -> None:
    for message in pool.run(unequal, world=4):
        assert "[[0, 1, 2], [3]]" in message and "equal parts" in message


def crossed() -> str:
    """FSDP2 over ranks {0, 1} and {2, 3}; the first peers of rank 0, but the second of rank 1."""
    model = small()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh["shard"])
    parts = [[0, 2], [1], [3]]
    groups = [dist.new_group(ranks) for ranks in parts]
    mine = next(group for group, ranks in zip(groups, parts, strict=True) if dist.get_rank() in ranks)
    try:
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step(), replicate_group=mine)
    except ValueError as error:
        return str(error)
    return "attached"


def test_replicas_of_which_some_ranks_have_no_peers_are_refused(pool: WorkerPool) -> None:
    assert all("a peer in every other replica" in message for message in pool.run(crossed, world=4))


def ranks_that_have_seen_other_groups() -> list[float]:
    """Torch counts a process's groups to name the next one; here each rank is in another number of them."""
    for ranks in ([0], [0], [0, 1]):
        dist.new_group(ranks)
    model = DistributedDataParallel(small())
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), streaming_diloco(every_steps=4, overlap_steps=1))
    for step in range(6):
        backward(model, dist.get_rank(), step)
        sync.step()
    sync.close_round()
    return flat(model).tolist()


def test_ranks_may_be_in_different_numbers_of_groups(pool: WorkerPool) -> None:
    one, *others = pool.run(ranks_that_have_seen_other_groups, world=3)
    assert all(other == one for other in others)


# ---- how long they wait ----------------------------------------------------------------------------------------------


def time_outs() -> set[timedelta]:
    dist.destroy_process_group()
    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(hours=3))
    model = DistributedDataParallel(small())
    mesh = build_mesh(1, 1)
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), streaming_diloco(every_steps=4, overlap_steps=1))
    channels = [mesh.channel, mesh.control, sync.pieces.channel, sync.method.channel]  # type: ignore[attr-defined]
    held = [t for channel in channels for t in channel.transports.values() if isinstance(t, TorchTransport)]
    assert len(held) == 4
    return {timeout_of(group) for group in (mesh.engine_group, *(transport.group for transport in held))}


def test_every_group_waits_as_long_as_the_default_one() -> None:
    with WorkerPool(1) as alone:
        assert alone.run(time_outs) == [{timedelta(hours=3)}]


# ---- what is left ----------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, Callable[[], Sync]]] = {
    "dense": ("ddp", every_step),
    "int8_ef": ("ddp", lambda: every_step(compress=error_feedback(quantize(bits=8)))),
    "fsdp": ("fsdp", every_step),
    "native HSDP": ("hsdp", lambda: diloco(every_steps=2)),
    "diloco": ("plain", lambda: diloco(every_steps=2)),
    "streaming": ("ddp", lambda: streaming_diloco(every_steps=4, overlap_steps=1)),
    "co2": ("plain", lambda: co2(every_steps=2)),
}


def held() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    gc.collect()
    return len(list(Path("/proc/self/task").iterdir())), len(os.listdir("/proc/self/fd"))


def settled(found: list[tuple[int, int]], index: int) -> list[tuple[int, int]]:
    """``found`` with what is held once threads that are on their way out have gone, at most some seconds later."""
    deadline = time.monotonic() + 20
    while any(now > then for now, then in zip(held(), found[index], strict=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [*found, held()]


def attached_often(method: str, times: int, early: bool) -> list[tuple[int, int]]:
    kind, spec = METHODS[method]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model: nn.Module = small()
    if kind == "fsdp":
        fully_shard(model, mesh=mesh["shard"])
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for number in range(times):
        sync = attach(model, optimizer, spec(), replicate_group=mesh.get_group("replicate") if kind == "fsdp" else None)
        for step in range(number % 3):  # none, too: who is done first frees what the other is still making
            backward(model, dist.get_rank(), step)
            sync.step()
        if early and dist.get_rank():
            dist.barrier()  # rank 0 has gone before
        sync.detach()
        if early and not dist.get_rank():
            dist.barrier()
        found.append(held())
    return settled(found, 1)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_detached_leaves_no_thread_and_no_descriptor(pool: WorkerPool, method: str) -> None:
    for rows in pool.run(attached_often, method, 8, method == "streaming", world=2):
        assert rows[-1] <= rows[1], f"threads and descriptors: {rows}"


def refused_often(times: int) -> list[tuple[int, int]]:
    found = []
    for _ in range(times):
        model = DistributedDataParallel(small())
        spec = every_step() if dist.get_rank() else every_step(compress=quantize(bits=8))
        with pytest.raises(ValueError, match="another sync"):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1), spec)
        found.append(held())
    return settled(found, 1)


def test_nor_does_what_is_refused(pool: WorkerPool) -> None:
    for rows in pool.run(refused_often, 5, world=2):
        assert rows[-1] <= rows[1], f"threads and descriptors: {rows}"


def after_the_default_group_is_gone() -> None:
    model = DistributedDataParallel(small())
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step())
    store = PrefixStore("again", dist.distributed_c10d._get_default_store())
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    sync.detach()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = DistributedDataParallel(small())
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every_step()).detach()


def test_detach_after_the_default_group_was_destroyed(pool: WorkerPool) -> None:
    pool.run(after_the_default_group_is_gone, world=2)


# ---- who watches them ------------------------------------------------------------------------------------------------


def seen_while_waiting(kind: str) -> tuple[list[str], list[str]]:
    """What the probe sees under way while rank 1 has not come yet, and afterwards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    channel = Channel({"replicate": TorchTransport.between(range(world))})
    store = dist.distributed_c10d._get_default_store()

    def flow() -> Flow[None]:
        payload = (torch.ones(world, 3),)
        yield AllToAll(payload) if kind == "all-to-all" else Shift(payload, (rank + 1) % world, (rank - 1) % world)

    def pending() -> list[str]:
        entries = [entry for entry in probe._collectives() if not entry["retired"]]
        return [str(probe._described(entry)["what"]) for entry in entries]

    if rank:
        store.wait(["seen"], timedelta(seconds=60))
        channel.run(flow(), "test")
        return [], []
    handle = channel.start(flow(), "test")
    while not (seen := pending()):
        pass
    store.set("seen", "1")
    handle.wait()
    del handle
    channel.close()
    return seen, pending()


@pytest.mark.parametrize("kind", ["all-to-all", "shift"])
def test_a_rank_that_waits_for_its_peers_is_seen_to(pool: WorkerPool, kind: str) -> None:
    seen, left = pool.run(seen_while_waiting, kind, world=2)[0]
    name = {"all-to-all": "AllToAll", "shift": "Shift"}[kind]
    assert seen == [f"{name} #1 of group dtrain 1 of 0 1 (6 float32)"] and left == []
