"""One process that simulates four replicas computes, bit for bit, what four gloo processes compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, co2, diloco, eager_diloco, every_step, post_local_sgd, slowmo, streaming_diloco
from dtrain.comm.channel import Channel
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.layout import Segment, matrices
from dtrain.comm.methods.every_step import EveryStep
from dtrain.comm.ops import Place
from dtrain.comm.plans.plan import kinds_of
from dtrain.comm.runtime.method import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.comm.transports.threads import Meeting
from dtrain.comm.transports.transport import SelfTransport
from dtrain.compress import ef21, error_feedback, quantize, topk
from dtrain.plans import by_layer
from dtrain.rounds import lengths, qsr
from dtrain.testing import WorkerPool
from dtrain.testing.replicas import Replica

pytestmark = pytest.mark.processes
WORLD, STEPS = 4, 12
LEAST_SQUARES = error_feedback(quantize("least_squares", bits=2, block=64))

SYNCS: dict[str, Callable[[], Sync]] = {
    "dense": lambda: every_step(),
    "native": lambda: every_step(route="all_reduce"),
    "int8_ef": lambda: every_step(compress=error_feedback(quantize(bits=8, block=64))),
    "int2_ef, coded": lambda: every_step(compress=LEAST_SQUARES, lossless=1),
    "stochastic": lambda: every_step(compress=error_feedback(quantize(bits=4, block=16, rounding="stochastic"))),
    "top-k": lambda: every_step(compress=error_feedback(topk(0.05))),
    "top-k, all-gather": lambda: every_step(compress=error_feedback(topk(0.05)), route="all_gather"),
    "top-k, sparse all-reduce": lambda: every_step(compress=error_feedback(topk(0.02)), route="sparse_all_reduce"),
    "mixed": lambda: every_step(compress=by_layer({"*bias": None}, default=ef21(topk(0.02), eta=1)), route="auto"),
    "diloco, top-k": lambda: diloco(every_steps=3, compress=error_feedback(topk(0.1, values=quantize(bits=8)))),
    "diloco": lambda: diloco(every_steps=4, compress=quantize(bits=8, block=64)),
    "diloco, int2_ef, coded": lambda: diloco(every_steps=4, compress=LEAST_SQUARES, lossless=1),
    "post_local_sgd": lambda: post_local_sgd(every_steps=3, warmup_steps=4),
    "slowmo": lambda: slowmo(every_steps=3),
    "streaming": lambda: streaming_diloco(
        every_steps=4, layers_per_fragment=1, overlap_steps=2, compress=error_feedback(quantize(bits=4, block=16))
    ),
    "eager": lambda: eager_diloco(every_steps=3),
    "co2": lambda: co2(every_steps=3, compress=quantize(bits=8, block=64)),
    "warm-up in few bits": lambda: diloco(
        every_steps=3, compress=error_feedback(quantize(bits=4, block=16)), warmup_steps=4, warmup_compress="same"
    ),
    "rounds of changing length": lambda: streaming_diloco(
        every_steps=lengths([5, 3, 4]), layers_per_fragment=1, overlap_steps=2, first_round="early"
    ),
    "rounds by the rate": lambda: diloco(every_steps=qsr(alpha=0.02, base=2)),
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


Reals = Callable[[str], list[Tensor]]


@pytest.fixture(scope="module")
def reals(pool: WorkerPool) -> Reals:
    """The real run of a sync, on all ranks; each sync is trained once."""
    return functools.cache(lambda name: pool.run(real, name))


class ModuleReplica(Replica):
    """A replica of the model, with its own AdamW."""

    def __init__(self, channel: Channel) -> None:
        self.module = model()
        parameters = dict(self.module.named_parameters())
        super().__init__(channel, {fqn: p.detach().view(-1) for fqn, p in parameters.items()}, 0.01)
        self.parameters = parameters
        self.values = {fqn: p.detach().view(-1) for fqn, p in parameters.items()}
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)

    def finish(self) -> None:
        if self.gradients:
            return
        self.gradients = {fqn: p.grad.view(-1) for fqn, p in self.parameters.items() if p.grad is not None}
        super().finish()
        for fqn, gradient in self.gradients.items():
            self.parameters[fqn].grad = gradient.view(self.parameters[fqn].shape).clone()

    def step(self) -> None:
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        super().skip()
        self.optimizer.zero_grad()


def in_threads(name: str) -> list[Tensor]:
    """All ranks as threads of this process: [STEPS, n] of each."""
    meeting = Meeting(WORLD)
    replicas = [
        ModuleReplica(Channel({"replicate": meeting.transport(r), "shard": SelfTransport()})) for r in range(WORLD)
    ]

    def train(rank: int) -> Tensor:
        torch.set_num_threads(1)  # as in the workers: a matrix product may be summed in another order with more
        attached, seen = SYNCS[name]().bind(replicas[rank], 5), []
        for step in range(STEPS):
            x, y = batch(step, rank)
            F.mse_loss(replicas[rank].module(x), y).backward()
            assert attached.step()
            seen.append(flat(dict(replicas[rank].module.named_parameters())))
        attached.method.settle()
        return torch.stack(seen)

    with ThreadPoolExecutor(WORLD) as threads:
        return list(threads.map(train, range(WORLD)))


def simulated(name: str) -> list[Tensor]:
    """All ranks in this process, gradients through `simulate`."""
    torch.set_num_threads(1)
    spec = SYNCS[name]()
    assert isinstance(spec, EveryStep)
    replicas = [model() for _ in range(WORLD)]
    optimizers = [torch.optim.AdamW(replica.parameters(), lr=0.01) for replica in replicas]
    states = [State(kinds_of(spec.plan)) for _ in range(WORLD)]
    seen: list[list[Tensor]] = [[] for _ in range(WORLD)]
    for step in range(STEPS):
        for rank, replica in enumerate(replicas):
            x, y = batch(step, rank)
            F.mse_loss(replica(x), y).backward()
        exchange_gradients(spec, replicas, states, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for rank, replica in enumerate(replicas):
            seen[rank].append(flat(dict(replica.named_parameters())))
    return [torch.stack(rows) for rows in seen]


def exchange_gradients(spec: EveryStep, replicas: list[nn.Module], states: list[State], step: int) -> None:
    flows = []
    for rank, (replica, state) in enumerate(zip(replicas, states, strict=True)):
        gradients = {n: p.grad.reshape(-1) for n, p in replica.named_parameters() if p.grad is not None}
        key, place = Key(5, step, rank), Place(rank, WORLD)
        segments = {fqn: Segment(fqn, 0, gradient.numel()) for fqn, gradient in gradients.items()}
        lies = matrices(segments, {fqn: tuple(p.shape) for fqn, p in replica.named_parameters()})
        flows.append(
            exchange(
                gradients,
                spec.plan,
                spec.rule,
                place,
                key,
                state,
                matrices=lies,
                route=spec.route,
                lossless=spec.lossless,
            )
        )
    for replica, state, combined in zip(replicas, states, simulate(flows), strict=True):
        state.commit()
        for fqn, parameter in replica.named_parameters():
            parameter.grad = combined.values[fqn].view(parameter.shape).clone()


BY_ROUTE = ["top-k", "top-k, all-gather", "top-k, sparse all-reduce", "mixed"]


@pytest.mark.parametrize("name", ["dense", "int8_ef", "int2_ef, coded", "stochastic", *BY_ROUTE])
def test_bitwise(reals: Reals, name: str) -> None:
    for mine, theirs in zip(simulated(name), reals(name), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", [name for name in SYNCS if name != "native"])
def test_threads_and_processes_are_one_to_the_bit(reals: Reals, name: str) -> None:
    for mine, theirs in zip(in_threads(name), reals(name), strict=True):
        assert torch.equal(mine, theirs)


def test_the_native_all_reduce_to_round_off(reals: Reals) -> None:
    # Adam makes a step of its learning rate out of a gradient's round-off where the gradient is nearly 0, so: one step.
    for mine, theirs in zip(simulated("native"), reals("native"), strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)


def test_replicas_are_bitwise_equal_where_the_method_says_so(reals: Reals) -> None:
    for name in ("dense", "int8_ef", "int2_ef, coded", "stochastic", *BY_ROUTE):
        first, *others = reals(name)
        assert all(torch.equal(first, other) for other in others)
    first, *others = reals("diloco")
    assert all(torch.equal(first[3::4], other[3::4]) for other in others)  # at the end of each round
    assert not torch.equal(first[0], others[0][0])
