"""Parameters of an FSDP2 model that are frozen and trained again in mid-run, whole units and parts of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain import attach, diloco, every_step, local_sgd, streaming_diloco
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_fsdp_units import BOTH, Paths, close, inputs, sharded, whole

pytestmark = pytest.mark.processes

FROZEN: dict[str, Callable[[Paths], list[nn.Module]]] = {
    "a unit": lambda net: [net.b],
    "a part of a unit": lambda net: [net.a[0]],
    "the last to be run": lambda net: [net.head],
    "the first to be run": lambda net: [net.stem],
    "several": lambda net: [net.a[2], net.b, net.head],
}
STEPS, FREEZE, UNFREEZE = 8, 2, 5


def freeze(net: Paths, what: str, step: int) -> None:
    if step in (FREEZE, UNFREEZE):
        for module in FROZEN[what](net):
            module.requires_grad_(step == UNFREEZE)


def trained(spec: Sync, what: str, shards: int) -> tuple[dict[str, Tensor], bool]:
    """The model at the end, and whether what was frozen stood still meanwhile."""
    replicas = dist.get_world_size() // shards
    model, peers = sharded(Paths(), replicas)
    sync = attach(model, torch.optim.AdamW(model.parameters(), lr=0.05), spec, replicate_group=peers)
    at_freeze: dict[str, Tensor] = {}
    stood = True
    for step in range(STEPS):
        freeze(model, what, step)
        if step == FREEZE:
            at_freeze = whole(model)
        model(inputs(dist.get_rank() // shards, step), BOTH).backward()
        assert sync.step()
        if FREEZE <= step < UNFREEZE:
            now = whole(model)
            frozen = {fqn for fqn, p in model.named_parameters() if not p.requires_grad}
            stood = stood and bool(frozen) and all(torch.equal(now[fqn], at_freeze[fqn]) for fqn in frozen)
    sync.close_round()
    sync.detach()
    return whole(model), stood


def expected(what: str, replicas: int) -> dict[str, Tensor]:
    """One process with the gradients of all replicas."""
    net = Paths()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    for step in range(STEPS):
        freeze(net, what, step)
        for replica in range(replicas):
            (net(inputs(replica, step), BOTH) / replicas).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {fqn: p.detach() for fqn, p in net.named_parameters()}


def dense(what: str, shards: int) -> tuple[dict[str, Tensor], bool]:
    return trained(every_step(), what, shards)


@pytest.mark.parametrize("what", FROZEN)
@pytest.mark.parametrize("shards", [1, 2])
def test_it_is_data_parallelism_with_the_same_parameters_frozen(pool: WorkerPool, shards: int, what: str) -> None:
    for found, stood in pool.run(dense, what, shards, world=2 * shards):
        assert stood
        close(found, expected(what, 2))


METHODS: dict[str, Callable[[], Sync]] = {
    "int8 feedback": lambda: every_step(compress=error_feedback(quantize(bits=8, block=8))),
    "local": lambda: local_sgd(every_steps=1),
    "diloco": lambda: diloco(every_steps=3),
    "streaming": lambda: streaming_diloco(every_steps=4, overlap_steps=1, layers_per_fragment=0),
}


def by_method(method: str, what: str) -> tuple[dict[str, Tensor], bool]:
    return trained(METHODS[method](), what, 1)


@pytest.mark.parametrize("what", ["a unit", "several"])
@pytest.mark.parametrize("method", METHODS)
def test_replicas_stay_equal_and_train_again(pool: WorkerPool, method: str, what: str) -> None:
    (one, _), (other, _) = pool.run(by_method, method, what, world=2)
    assert all(torch.equal(one[fqn], other[fqn]) for fqn in one)
    first = {fqn: p.detach() for fqn, p in Paths().named_parameters()}
    assert all(not torch.equal(one[fqn], first[fqn]) for fqn in one)
