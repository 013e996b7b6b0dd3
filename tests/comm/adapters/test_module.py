"""Local updates on a plain module, and by the transport's own all-reduce: the same as on DDP, in two phases."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, fedavg_m, scaffold_m
from dtrain.compress import error_feedback, powersgd, quantize
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, flat, small

pytestmark = pytest.mark.processes


def local_updates_on_a_plain_module() -> list[bool]:
    """Beside DDP, over two rounds: the same bits, and either goes on from the state of the other."""
    found = []
    models = (DistributedDataParallel(small()), small(seed=dist.get_rank()))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in models]
    sync = diloco(every_steps=3, compress=error_feedback(quantize(bits=8, block=16)))
    attached = [attach(model, optimizer, sync) for model, optimizer in zip(models, optimizers, strict=True)]

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            for model, each in zip(models, attached, strict=True):
                backward(model, dist.get_rank(), step)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                each.step()
            found.append(torch.equal(flat(models[0]), flat(models[1])))

    steps(0, 7)
    kept = [copy.deepcopy((m.state_dict(), o.state_dict(), a.state_dict()))
            for m, o, a in zip((models[0].module, models[1]), optimizers, attached, strict=True)]  # fmt: skip
    steps(7, 10)
    ended = flat(models[0])
    for module, optimizer, each, (weights, inner, state) in zip(
        (models[0].module, models[1]), optimizers, attached, reversed(kept), strict=True
    ):
        module.load_state_dict(weights)
        optimizer.load_state_dict(inner)
        each.load_state_dict(state)
    steps(7, 10)
    found.append(torch.equal(flat(models[0]), ended))
    for each in attached:
        each.detach()
    optimizers[1].step()  # it is the user's again
    return found


def directed_steps_on_a_plain_module() -> list[bool]:
    """Beside DDP, of one backward pass a step and of two."""
    found = []
    for method in (fedavg_m(every_steps=2, beta=0.4), scaffold_m(every_steps=2, beta=0.6)):
        for passes in (1, 2):
            models = [DistributedDataParallel(small()), small()]
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
            attached = [attach(model, inner, method) for model, inner in zip(models, optimizers, strict=True)]
            for step in range(5):
                for model, each in zip(models, attached, strict=True):
                    for number in range(passes):
                        backward(model, dist.get_rank(), 10 * step + number)
                    each.finish()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    assert each.step()
            torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-4, atol=1e-6)
            found.append(torch.equal(flat(models[0]), flat(models[1])) or passes > 1)
            for each in attached:
                each.detach()
    return found


@pytest.mark.processes
def test_methods_that_direct_steps_take_a_plain_module(pool: WorkerPool) -> None:
    for found in pool.run(directed_steps_on_a_plain_module, world=2):
        assert found == [True] * 4


def rounds_by_a_native_all_reduce() -> list[tuple[Tensor, Tensor, bool]]:
    """Two routes; replicas count by their tokens, and one has nothing finite to give in the last round."""
    found = []
    for compress in (None, powersgd(2)):
        models = [DistributedDataParallel(small()), small()]
        syncs = [diloco(every_steps=2, compress=compress, route=route) for route in ("two_phase", "all_reduce")]
        attached = [
            attach(m, torch.optim.SGD(m.parameters(), lr=0.1), sync) for m, sync in zip(models, syncs, strict=True)
        ]
        for step in range(4):
            for model, each in zip(models, attached, strict=True):
                backward(model, dist.get_rank(), step)
                each.weigh(3 + 4 * dist.get_rank())
                if step == 3 and dist.get_rank() == 1:
                    each.finish()
                    with torch.no_grad():
                        next(iter(model.parameters()))[0, 0] = float("inf")
                each.step()
        assert [each.method.left_out for each in attached] == 2 * [int(dist.get_rank() == 1)]  # type: ignore[attr-defined]
        found.append((flat(models[0]), flat(models[1]), attached[1].verify()))
    return found


def test_local_updates_need_nothing_around_a_module(pool: WorkerPool) -> None:
    assert pool.run(local_updates_on_a_plain_module, world=2) == 2 * [14 * [True]]


def test_rounds_go_by_a_native_all_reduce_too(pool: WorkerPool) -> None:
    everybody = pool.run(rounds_by_a_native_all_reduce, world=2)
    for one, other in zip(*everybody, strict=True):
        for theirs, mine, equal in (one, other):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
            assert equal
        assert torch.equal(one[1], other[1])
