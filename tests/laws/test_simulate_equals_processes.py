"""One process that simulates four replicas computes, bit for bit, what four gloo processes compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, error_feedback, every_step, quantize
from dtrain.comm.combine import combine
from dtrain.comm.compressors.lowrank import matrices
from dtrain.comm.drivers.simulate import simulate
from dtrain.comm.layout import Segment
from dtrain.comm.ops import Place
from dtrain.comm.plans.base import kinds_of
from dtrain.comm.schedules.every_step import EveryStep
from dtrain.comm.schedules.local_update import LocalUpdate, local_update_round
from dtrain.comm.schedules.sync import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.testing import WorkerPool

pytestmark = pytest.mark.processes
WORLD, STEPS = 4, 12

SYNCS: dict[str, Callable[[], Sync]] = {
    "dense": lambda: every_step(),
    "native": lambda: every_step(route="all_reduce"),
    "int8_ef": lambda: every_step(compress=error_feedback(quantize(bits=8, block=64))),
    "stochastic": lambda: every_step(compress=error_feedback(quantize(bits=4, block=16, rounding="stochastic"))),
    "diloco": lambda: diloco(every_steps=4, compress=quantize(bits=8, block=64)),
}


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 37), nn.Tanh(), nn.Linear(37, 5))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(6, 13, generator=generator), torch.randn(6, 5, generator=generator)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().reshape(-1) for name in sorted(tensors)])


def real(name: str) -> Tensor:
    """One rank of the real run: its parameters after each step, [STEPS, n]."""
    ddp = DistributedDataParallel(model(), bucket_cap_mb=0.004)  # several buckets, and others after the first step
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    attached = attach(ddp, optimizer, SYNCS[name](), seed=5)
    seen = []
    for step in range(STEPS):
        x, y = batch(step, dist.get_rank())
        F.mse_loss(ddp(x), y).backward()
        assert attached.step()
        seen.append(flat(dict(ddp.module.named_parameters())))
    attached.detach()
    return torch.stack(seen)


def simulated(name: str) -> list[Tensor]:
    """All ranks in this process."""
    torch.set_num_threads(1)  # as in the workers: a matrix product may be summed in another order with more
    spec = SYNCS[name]()
    replicas = [model() for _ in range(WORLD)]
    optimizers = [torch.optim.AdamW(replica.parameters(), lr=0.01) for replica in replicas]
    kinds = spec.kinds if isinstance(spec, LocalUpdate) else kinds_of(spec.plan)  # type: ignore[attr-defined]
    states = [State(kinds) for _ in range(WORLD)]
    if isinstance(spec, LocalUpdate):
        for replica, state in zip(replicas, states, strict=True):
            for fqn, value in pieces(replica).items():
                state.stage(fqn, "anchor", value)
            state.commit()
    seen: list[list[Tensor]] = [[] for _ in range(WORLD)]
    for step in range(STEPS):
        for rank, replica in enumerate(replicas):
            x, y = batch(step, rank)
            F.mse_loss(replica(x), y).backward()
        if isinstance(spec, EveryStep):
            exchange_gradients(spec, replicas, states, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(spec, LocalUpdate) and (step + 1) % spec.every_steps == 0:
            round_of(spec, replicas, states, step + 1)
        for rank, replica in enumerate(replicas):
            seen[rank].append(flat(dict(replica.named_parameters())))
    return [torch.stack(rows) for rows in seen]


def pieces(replica: nn.Module) -> dict[str, Tensor]:
    return {fqn: p.detach().reshape(-1).clone() for fqn, p in replica.named_parameters()}


def exchange_gradients(spec: EveryStep, replicas: list[nn.Module], states: list[State], step: int) -> None:
    flows = []
    for rank, (replica, state) in enumerate(zip(replicas, states, strict=True)):
        gradients = {n: p.grad.reshape(-1) for n, p in replica.named_parameters() if p.grad is not None}
        key, place = Key(5, step, rank), Place(rank, WORLD)
        segments = {fqn: Segment(fqn, 0, gradient.numel()) for fqn, gradient in gradients.items()}
        lies = matrices(segments, {fqn: tuple(p.shape) for fqn, p in replica.named_parameters()})
        flows.append(combine(gradients, spec.plan, spec.rule, place, key, state, matrices=lies, route=spec.route))
    for replica, state, combined in zip(replicas, states, simulate(flows), strict=True):
        state.commit()
        for fqn, parameter in replica.named_parameters():
            parameter.grad = combined.values[fqn].view(parameter.shape).clone()


def round_of(spec: LocalUpdate, replicas: list[nn.Module], states: list[State], step: int) -> None:
    flows = [
        local_update_round(spec, pieces(replica), Place(rank, WORLD), Key(5, step, rank), state)
        for rank, (replica, state) in enumerate(zip(replicas, states, strict=True))
    ]
    simulate(flows)
    for replica, state in zip(replicas, states, strict=True):
        state.commit()
        with torch.no_grad():
            for fqn, parameter in replica.named_parameters():
                parameter.copy_(state.tensors[fqn]["anchor"].view(parameter.shape))


@pytest.mark.parametrize("name", ["dense", "int8_ef", "stochastic", "diloco"])
def test_bitwise(pool: WorkerPool, name: str) -> None:
    for mine, theirs in zip(simulated(name), pool.run(real, name), strict=True):
        assert torch.equal(mine, theirs)


def test_the_native_all_reduce_to_round_off(pool: WorkerPool) -> None:
    # Adam makes a step of its learning rate out of a gradient's round-off where the gradient is nearly 0, so: one step.
    for mine, theirs in zip(simulated("native"), pool.run(real, "native"), strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)


def test_replicas_are_bitwise_equal_where_the_method_says_so(pool: WorkerPool) -> None:
    for name in ("dense", "int8_ef", "stochastic"):
        first, *others = pool.run(real, name)
        assert all(torch.equal(first, other) for other in others)
    first, *others = pool.run(real, "diloco")
    assert all(torch.equal(first[3::4], other[3::4]) for other in others)  # at the end of each round
    assert not torch.equal(first[0], others[0][0])
