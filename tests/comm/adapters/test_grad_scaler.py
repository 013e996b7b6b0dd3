"""A loss scale under a sync: an infinity on one rank is skipped by all, and every rank's scale falls."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from dtrain import GradScaler, attach, diloco, every_step
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize, topk
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import data, flat, small

pytestmark = pytest.mark.processes

SPECS: dict[str, Sync] = {
    "dense": every_step(),
    "top-k": every_step(compress=error_feedback(topk(0.2))),
    "diloco": diloco(every_steps=4, compress=error_feedback(quantize(bits=4, block=16))),
}
STEPS, BROKEN = 20, (7, 13)


def trained(name: str, fused: bool, several: bool) -> tuple[list[float], tuple[int, int], list[float], float]:
    """The scale after each step; steps made and skipped; the parameters; the largest difference from unscaled steps."""
    ends = []
    scales: list[float] = []
    counted = (0, 0)
    for scaled in (True, False):
        net = small()
        model = DistributedDataParallel(net)
        halves = [net[0], net[2]] if several else [net]
        optimizers = [AdamW(half.parameters(), lr=0.02, fused=fused) for half in halves]
        sync = attach(model, optimizers, SPECS[name], forward_steps=True)
        scaler = GradScaler(sync, "cpu", init_scale=1024.0, growth_interval=4, enabled=scaled)
        for step in range(STEPS):
            x, y = data(dist.get_rank(), step)
            loss = (model(x) - y).square().mean() * (float("inf") if step in BROKEN and dist.get_rank() == 1 else 1.0)
            scaler.scale(loss).backward()
            for optimizer in optimizers if scaled else []:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            if scaled:
                scales.append(scaler.get_scale())
        sync.close_round()
        counted = sync.steps, sync.skipped
        sync.detach()
        ends.append(flat(net))
    return scales, counted, ends[0].tolist(), float((ends[0] - ends[1]).abs().max())


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_all_ranks_skip_and_scale_alike(pool: WorkerPool, name: str, fused: bool, several: bool) -> None:
    first, second = pool.run(trained, name, fused, several, world=2)
    own = name == "diloco"  # a replica skips alone
    assert first[2:] == second[2:] and (own or first == second)
    assert first[1] == (STEPS, 0 if own else len(BROKEN)) and second[1] == (STEPS, len(BROKEN))
    scales, _, _, off = second
    assert [scales[step] < scales[step - 1] for step in BROKEN] == [True, True]
    assert max(scales) > 1024.0
    assert off < 1e-5  # powers of two: what feedback keeps is rescaled exactly


def refused() -> str:
    model = DistributedDataParallel(small())
    sync = attach(model, AdamW(model.parameters()), every_step())
    try:
        GradScaler(sync, "cpu")
    except ValueError as error:
        return str(error)
    return ""


def test_it_needs_the_steps(pool: WorkerPool) -> None:
    assert all("attach with forward_steps=True" in said for said in pool.run(refused, world=2))
