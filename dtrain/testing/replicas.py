"""Replicas that train a small problem with SGD as threads of this process, to test syncs bitwise without a network.

`Replica` is the seam to a model, `dtrain.comm.pieces.Pieces`, without a model: flat parameters whose gradients are a
function. What `attach` makes of a sync runs on it, with any number of replicas and no process group.

    >>> from dtrain import diloco
    >>> replicas = Replicas(diloco(every_steps=2), world=3)
    >>> replicas.train(steps=4)
    >>> equal(replicas.live(0), replicas.live(2))
    True
    >>> replicas.close()
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.layout import Named, Segment, copied, is_finite
from dtrain.comm.ops import Place
from dtrain.comm.pieces import Exchange
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.threads import Meeting
from dtrain.comm.transports.transport import SelfTransport

R = TypeVar("R")
Parameters = dict[str, Tensor]
Gradient = Callable[[int, int, str, Tensor], Tensor]
"""(rank, step, fqn, parameter) -> gradient."""
SIZES = (1, 7, 61)
"""Sizes of the parameters by default."""


def draw(seed: int, numel: int) -> Tensor:
    """``numel`` normal fp32 values; the same ones for the same arguments."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def quadratic(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
    """The gradient of a quadratic that differs by rank, with noise that differs by step."""
    towards, noise = (draw(seed, x.numel()).to(x.device) for seed in (rank, 1000 * rank + step))
    return (1 + 0.3 * rank) * (x - towards) + 0.1 * noise


def common(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
    """The same gradient on all ranks."""
    return quadratic(0, step, fqn, x)


class Replica:
    """`Pieces` of one rank: flat parameters, and SGD."""

    def __init__(self, channel: Channel, start: Named, lr: float) -> None:
        self.channel = channel
        self.values = {fqn: value.clone() for fqn, value in start.items()}
        self.gradients: Parameters = {}
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
        self.segments = {fqn: Segment(fqn, 0, value.numel()) for fqn, value in start.items()}
        self.held = self.segments
        self.shapes = {fqn: tuple(value.shape) for fqn, value in start.items()}
        self._exchange: Exchange | None = None
        self._exchanged = False

    @property
    def place(self) -> Place:
        return self.channel.places["replicate"]

    def read(self, fqns: Collection[str] | None = None, *, copy: bool = True) -> Parameters:
        values = {fqn: value for fqn, value in self.values.items() if fqns is None or fqn in fqns}
        return copied(values) if copy else values

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        for fqn, value in values.items():
            self.values[fqn].copy_(value)

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        self._exchange = exchange

    def finish(self) -> None:
        if self._exchange is not None and self.gradients and not self._exchanged:
            self.gradients = self.channel.run(self._exchange(self.gradients), "gradients").values
            self._exchanged = True

    def gradients_finite(self) -> bool:
        return is_finite(*self.gradients.values())

    def unused(self) -> set[str]:
        return set()

    def step(self) -> None:
        lr = float(self.optimizer.param_groups[0]["lr"])
        for fqn, gradient in self.gradients.items():
            self.values[fqn] -= lr * gradient
        self.skip()

    def skip(self) -> None:
        self.gradients, self._exchanged = {}, False

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        self.write(parameters)

    def detach(self) -> None: ...


class Replicas:
    """``world`` of them under one sync, each in a thread.

    ``gradient``: of (rank, step, fqn, parameter), which differs by rank by default; ``start``: the first parameters,
    flat, on any device; ``shapes``: theirs, for what tells matrices from vectors.
    """

    def __init__(
        self,
        spec: Sync,
        world: int,
        *,
        gradient: Gradient = quadratic,
        lr: float = 0.05,
        start: Named | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.spec, self.world, self.gradient = spec, world, gradient
        if start is None:
            start = {f"layers.{i}.weight": draw(5000 + i, numel) for i, numel in enumerate(SIZES)}
        self.start = start
        meeting = Meeting(world)
        self.pieces = [
            Replica(Channel({"replicate": meeting.transport(rank), "shard": SelfTransport()}), start, lr)
            for rank in range(world)
        ]
        if shapes is not None:
            for pieces in self.pieces:
                pieces.shapes = dict(shapes)
        self._threads = ThreadPoolExecutor(world)
        self.attached: list[Attached] = self.all(lambda rank: spec.bind(self.pieces[rank], 0))

    def all(self, call: Callable[[int], R]) -> list[R]:
        """``call(rank)`` on every rank at once."""
        return list(self._threads.map(call, range(self.world)))

    def close(self) -> None:
        """Detach, and end the threads."""
        self.all(lambda rank: self.attached[rank].detach(saved=True))
        self._threads.shutdown()

    def train(self, steps: int) -> None:
        """Train for ``steps`` steps on every rank."""
        self.all(lambda rank: self._train(rank, steps))

    def _train(self, rank: int, steps: int) -> None:
        pieces, attached = self.pieces[rank], self.attached[rank]
        for _ in range(steps):
            parameters = pieces.values.items()
            pieces.gradients = {fqn: self.gradient(rank, attached.steps, fqn, x) for fqn, x in parameters}
            attached.step()

    def live(self, rank: int) -> Parameters:
        """A copy of a rank's parameters."""
        return self.pieces[rank].read()

    def kept(self, rank: int, name: str) -> Parameters:
        """A copy of what a rank's sync keeps under ``name``: "anchor", "residual", ..."""
        tensors = self.attached[rank].state.tensors
        return {fqn: named[name].clone() for fqn, named in tensors.items() if name in named}

    @property
    def anchor(self) -> Parameters:
        """That of rank 0."""
        return self.kept(0, "anchor")

    def resumed(self) -> Replicas:
        """New replicas that resume from the states of these."""
        states = self.all(lambda rank: copy.deepcopy(self.attached[rank].state_dict()))
        lr = float(self.pieces[0].optimizer.param_groups[0]["lr"])
        replicas = Replicas(self.spec, self.world, gradient=self.gradient, lr=lr, start=self.start)
        for rank in range(self.world):
            replicas.pieces[rank].write(self.live(rank))
        replicas.all(lambda rank: replicas.attached[rank].load_state_dict(states[rank]))
        return replicas


def equal(one: Named, other: Named) -> bool:
    """Bitwise: a NaN equals itself, and 0 differs from -0."""
    return one.keys() == other.keys() and all(torch.equal(_bits(one[fqn]), _bits(other[fqn])) for fqn in one)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
