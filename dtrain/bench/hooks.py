"""What `dtrain bench hooks` measures: one step's gradient of a DDP model, exchanged by torch's hooks and by ours.

The model is one matrix, near square, whose gradient is known: a function of the rank and of nothing else. All that a
backward pass costs besides is one multiplication, the same for every hook.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.adapters.adapter import pieces_of
from dtrain.comm.channel import Channel, Handle
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.layout import Segment, matrices
from dtrain.comm.methods.every_step import EveryStep
from dtrain.comm.ops import Flow, Place
from dtrain.comm.plans.adaptive import begun
from dtrain.comm.plans.plan import kinds_of
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.comm.transports.transport import SelfTransport
from dtrain.train.config import compose, instantiate

__all__ = ["GROUPS", "HOOKS", "LEAST_WARMUP", "Hook", "disagreeing", "error", "gradient", "prepare"]

R = TypeVar("R")

COMPRESS = Path(__file__).resolve().parent.parent / "configs" / "compress"
SUMMABLE = ("bf16", "fp16", "none", "powersgd16_ef", "powersgd_ef", "projection_ef", "randk_ef")
"""Choices of the group compress that the transport's own all-reduce can carry."""
AS_ALL_REDUCE = ":all_reduce"

TORCH = ("torch.all_reduce", "torch.fp16", "torch.bf16", "torch.powersgd")
SPARSE = ("topk_econtrol", "topk_ef", "topk_ef21", "topk_int4_ef")
"""Choices of the group compress that have routes of their own; by their names alone the cost model chooses one."""
OURS = tuple(
    sorted([
        *(path.stem for path in COMPRESS.glob("*.yaml")), *(name + AS_ALL_REDUCE for name in SUMMABLE),
        *(f"{name}:{route}" for name in SPARSE for route in ("two_phase", "all_gather", "sparse_all_reduce")),
    ])
)  # fmt: skip
HOOKS = (*TORCH, *OURS)
GROUPS: Mapping[str, tuple[str, ...]] = {"all": HOOKS, "torch": TORCH, "dtrain": OURS}

POWERSGD_RANK = 4  # that of powersgd_ef
LEAST_WARMUP = 4
"""Exchanges before the first that is timed: torch's PowerSGD hook sends its first ones in full."""
ROUND_OFF = {"torch.all_reduce": 1e-5, "torch.fp16": 2e-3, "torch.bf16": 2e-2, AS_ALL_REDUCE: 1e-5}
"""Tolerance of an element, relative to the largest value, where the transport orders the sum."""


class Weight(nn.Module):
    """One matrix, whose gradient is ``values``."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(values))
        self.values = values

    def forward(self) -> Tensor:
        return (self.weight * self.values).sum()


@dataclass
class Clock:
    """Seconds of flows: before their first op, in ops, and after that."""

    encode: float = 0.0
    exchange: float = 0.0
    decode: float = 0.0

    def restart(self) -> None:
        """Begin again at zero."""
        self.encode = self.exchange = self.decode = 0.0

    def shares(self) -> tuple[float, float, float]:
        """The fractions of encode, exchange and decode; zeros if nothing was timed."""
        total = self.encode + self.exchange + self.decode
        return (self.encode / total, self.exchange / total, self.decode / total) if total else (0.0, 0.0, 0.0)


class ClockedChannel(Channel):
    """A channel over the transports of another one, which times its exchanges of gradients."""

    def __init__(self, channel: Channel) -> None:
        super().__init__({**channel.transports, "shard": SelfTransport()})
        self.clock = Clock()

    def start(self, flow: Flow[R], label: str, then: Callable[[Handle[R]], None] | None = None) -> Handle[R]:
        return super().start(_clocked(flow, self.clock) if label == "gradients" else flow, label, then)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Finish what was started. The transports belong to the channel that lent them, and serve the next hook."""
        self._end(timeout_seconds)


class Hook(Protocol):
    """A hook attached to a model."""

    def exchange(self) -> None:
        """One backward pass, with the exchange of its gradient."""

    def after(self) -> None:
        """What follows a step and is not timed."""

    def gradient(self) -> Tensor:
        """Flat, after `exchange`."""

    def wrong(self, first: Tensor) -> int:
        """Elements of ``first``, the flat result of the first exchange, that are wrong."""

    clock: Clock

    def sent_bytes(self) -> int:
        """Payload that this rank has sent so far, counted exactly; 0 where it is not counted."""

    def close(self) -> None:
        """Detach from the model."""


def gradient(rank: int, numel: int, device: torch.device) -> Tensor:
    """``[rows, columns]`` near square: normal values whose scale differs by row, the same on any device."""
    columns = 2 ** round(math.log2(max(1, numel)) / 2)
    rows = max(1, numel // columns)
    generator = torch.Generator().manual_seed(1000 + rank)
    values = torch.randn(rows, columns, generator=generator)
    common = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    sizes = torch.logspace(-3, 0, rows).unsqueeze(1)  # rows of a matrix differ
    return ((common + values) * sizes).to(device)


def prepare(name: str, numel: int, channel: Channel, device: torch.device) -> Hook:
    """The hook ``name`` on a model of its own, on every rank alike."""
    place = channel.places["replicate"]
    model = DistributedDataParallel(Weight(gradient(place.rank, numel, device)), bucket_cap_mb=1 << 14)
    return _Torch(name, model, place) if name in TORCH else _Ours(name, model, channel)


@dataclass
class _OnDDP:
    name: str
    model: DistributedDataParallel

    def exchange(self) -> None:
        self.model().backward()

    def gradient(self) -> Tensor:
        grad = self.model.module.weight.grad
        assert isinstance(grad, Tensor)
        return grad.reshape(-1)


class _Torch(_OnDDP):
    def __init__(self, name: str, model: DistributedDataParallel, place: Place) -> None:
        super().__init__(name, model)
        self.place = place
        self.clock = Clock()
        match name:
            case "torch.fp16":
                model.register_comm_hook(None, default_hooks.fp16_compress_hook)
            case "torch.bf16":
                model.register_comm_hook(None, default_hooks.bf16_compress_hook)
            case "torch.powersgd":
                state = PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2)
                model.register_comm_hook(state, powerSGD_hook)

    def after(self) -> None:
        self.model.zero_grad()

    def wrong(self, first: Tensor) -> int:
        if self.name == "torch.powersgd":  # its first exchange is a plain one
            return _off(first, _mean(first, self.place), ROUND_OFF["torch.all_reduce"])
        return _off(first, _mean(first, self.place), ROUND_OFF[self.name])

    def sent_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


class _Ours(_OnDDP):
    def __init__(self, name: str, model: DistributedDataParallel, channel: Channel) -> None:
        super().__init__(name, model)
        self.channel = ClockedChannel(channel)
        self.clock = self.channel.clock
        self.spec = _spec(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self.attached = self.spec.bind(pieces_of(model, optimizer, self.channel, overlap=False), seed=0)

    def after(self) -> None:
        self.attached.step()

    def wrong(self, first: Tensor) -> int:
        expected = self._simulated(first)
        if self.name.endswith(AS_ALL_REDUCE):
            return _off(first, expected, ROUND_OFF[AS_ALL_REDUCE])
        return int((first != expected).sum())

    def sent_bytes(self) -> int:
        return self.channel.meter.sent_as("gradients")

    def close(self) -> None:
        self.attached.detach()

    def _simulated(self, like: Tensor) -> Tensor:
        """The correct result of the first exchange, simulated here from the gradients of all ranks."""
        world, fqn = self.channel.places["replicate"].size, "weight"
        shape = tuple(self.model.module.weight.shape)
        lie = matrices({fqn: Segment(fqn, 0, like.numel())}, {fqn: shape})

        def flow(rank: int) -> Flow[Tensor]:
            plan = begun(_spec(self.name).plan, [fqn])
            values = {fqn: gradient(rank, like.numel(), like.device).reshape(-1)}
            place, state = Place(rank, world), State(kinds_of(plan))
            key = Key(0, 0, rank)
            combined = yield from exchange(
                values, plan, self.spec.rule, place, key, state, matrices=lie, route=self.spec.route
            )
            return combined.values[fqn]

        return simulate([flow(rank) for rank in range(world)])[0]


def _spec(name: str) -> EveryStep:
    choice, _, route = name.partition(":")
    chosen = compose(["sync=every_step", f"compress={choice}"]).sync
    return cast(EveryStep, instantiate({**chosen, **({"route": route} if route else {})}, "sync"))


def _clocked(flow: Flow[R], clock: Clock) -> Flow[R]:
    moment = time.perf_counter()
    try:
        op = next(flow)
        clock.encode += time.perf_counter() - moment
        while True:
            moment = time.perf_counter()
            reply = yield op
            clock.exchange += time.perf_counter() - moment
            moment = time.perf_counter()
            try:
                op = flow.send(reply)
            finally:
                clock.decode += time.perf_counter() - moment
    except StopIteration as done:
        result: R = done.value
        return result


def disagreeing(values: Tensor) -> int:
    """Elements that are not bitwise those of rank 0."""
    reference = values.clone()
    dist.broadcast(reference, src=0)
    return int((values != reference).sum())


def error(first: Tensor, place: Place) -> float:
    """The first exchange's error: its distance from the mean, relative to the mean's norm."""
    expected = _mean(first, place)
    return float((first.double() - expected).norm() / expected.norm())


def _mean(like: Tensor, place: Place) -> Tensor:
    total = sum(gradient(rank, like.numel(), like.device).reshape(-1).double() for rank in range(place.size))
    assert isinstance(total, Tensor)
    return total / place.size


def _off(values: Tensor, expected: Tensor, share: float) -> int:
    """Elements that differ by more than ``share`` of the largest magnitude, or are not finite."""
    limit = share * float(expected.abs().max())
    return int((~((values.double() - expected.double()).abs() <= limit)).sum())
