"""A small task on which five seeds are affordable: handwritten digits, a network of 2,410 parameters, some machines.

1,797 images of 8 x 8 (scikit-learn's ``load_digits``, which ships with its wheel; `make evidence` installs it): 1,200
to train on, 200 to choose learning rates on, 397 to report. Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.comm.adapters.module import ModulePieces
from dtrain.comm.channel import Channel
from dtrain.comm.layout import Segment
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.comm.shared_seed.byte_codec import decode, encode
from dtrain.comm.shared_seed.directions import Noise, Walk, single
from dtrain.comm.transports.threads import Meeting
from dtrain.comm.transports.transport import SelfTransport

TRAINED, CHOOSING, BATCH, EPS = 1200, 200, 64, 1e-3
SHAPES = {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)}
SEGMENTS = {fqn: Segment(fqn, 0, math.prod(shape)) for fqn, shape in SHAPES.items()}
PARAMETERS = sum(segment.numel for segment in SEGMENTS.values())
CODES: dict[str, Callable[[float], float]] = {
    "fp32": single,
    "9 bits, as the reference's": lambda g: math.copysign(
        math.exp(min(127, max(-127, round(16 * math.log(max(abs(g), 1e-30))))) / 16), g
    ),
    "one byte": lambda g: decode(encode(g)),
    "one bit": lambda g: math.copysign(1.0, g),
}


@dataclass(frozen=True)
class Split:
    """Images [n, 64] in [0, 1], and what they show [n]."""

    x: Tensor
    y: Tensor


@functools.cache
def splits() -> tuple[Split, Split, Split]:
    """To train on, to choose learning rates on, to report."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    borders = (0, TRAINED, TRAINED + CHOOSING, len(y))
    train, choose, test = (Split(x[a:b], y[a:b]) for a, b in itertools.pairwise(borders))
    return train, choose, test


def network(seed: int) -> nn.Sequential:
    """The network that ``seed`` begins with."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = 64 if name.startswith("0") else 32
            parameter.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=generator)
    return model


def accuracy(model: nn.Module, split: Split) -> float:
    """The part of ``split`` that ``model`` gets right."""
    with torch.no_grad():
        return float((model(split.x).argmax(1) == split.y).float().mean())


@dataclass(frozen=True)
class Zeroth:
    """Machines that each try one direction a step, and take the step together."""

    machines: int
    lr: float
    steps: int = 1500
    code: str = "one byte"
    noise: Noise = "signs"


def zeroth(asked: Zeroth, seed: int) -> dict[str, list[float]]:
    """Accuracy after every 300 steps on the two splits that are not trained on.

    What every machine would do is done once: that they are equal to the bit is a test's affair.
    """
    train, choose, test = splits()
    model, walk, code = network(seed), Walk(seed, noise=asked.noise), CODES[asked.code]
    values = {fqn: parameter.detach().view(-1) for fqn, parameter in model.named_parameters()}
    curves: dict[str, list[float]] = {"choose": [], "test": []}
    for step in range(asked.steps):
        moves = []
        base = {fqn: value.clone() for fqn, value in values.items()}
        for machine in range(asked.machines):
            drawn = torch.Generator().manual_seed(seed * 10**9 + step * 1000 + machine)
            picked = torch.randint(TRAINED, (BATCH,), generator=drawn)
            along = walk.directions([(step, machine, 0)], list(SEGMENTS.values()))
            ways = []
            for by in (EPS, -EPS):
                for (fqn, value), direction in zip(values.items(), along, strict=True):
                    torch.add(base[fqn], direction, alpha=by, out=value)
                with torch.no_grad():
                    ways.append(float(functional.cross_entropy(model(train.x[picked]), train.y[picked])))
            moves.append((along, code((ways[0] - ways[1]) / (2 * EPS))))
        for (fqn, value), number in zip(values.items(), range(len(values)), strict=True):
            value.copy_(base[fqn])
            for along, slope in moves:
                value.add_(along[number] * single(-asked.lr * slope / asked.machines))
        if (step + 1) % 300 == 0:
            curves["choose"].append(accuracy(model, choose))
            curves["test"].append(accuracy(model, test))
    return curves


def first_order(lr: float, seed: int, steps: int = 1500) -> dict[str, list[float]]:
    """SGD by backpropagation on one machine's batches, for the line that has to be on every plot."""
    train, choose, test = splits()
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    curves: dict[str, list[float]] = {"choose": [], "test": []}
    for step in range(steps):
        drawn = torch.Generator().manual_seed(seed * 10**9 + step * 1000)
        picked = torch.randint(TRAINED, (BATCH,), generator=drawn)
        functional.cross_entropy(model(train.x[picked]), train.y[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 300 == 0:
            curves["choose"].append(accuracy(model, choose))
            curves["test"].append(accuracy(model, test))
    return curves


def shares(clients: int, skewed: bool, seed: int) -> list[Tensor]:
    """Which examples each client has: at random, or two classes each."""
    train, _, _ = splits()
    if not skewed:
        order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(seed))
        return list(order.chunk(clients))
    return [((train.y == 2 * n % 10) | (train.y == (2 * n + 1) % 10)).nonzero().flatten() for n in range(clients)]


def rounds(sync: Sync, *, lr: float, seed: int, clients: int = 5, skewed: bool = False, count: int = 25,
           every: int = 60) -> dict[str, list[float]]:  # fmt: skip
    """Accuracy after each round of ``clients`` that train under ``sync``, as threads of this process."""
    train, choose, test = splits()
    meeting, owned = Meeting(clients), shares(clients, skewed, seed)
    models = [network(seed) for _ in range(clients)]
    curves: dict[str, list[float]] = {"choose": [], "test": [], "sent": []}
    turn = threading.Lock()  # one at a time, but where they meet: threads that compete for the interpreter are slow

    def client(rank: int) -> None:
        channel = Channel({"replicate": meeting.transport(rank), "shard": SelfTransport()})
        optimizer = torch.optim.SGD(models[rank].parameters(), lr=lr)
        attached: Attached = sync.bind(ModulePieces(models[rank], optimizer, channel), seed)
        before = attached.meter.sent_bytes
        for step in range(count * every):
            drawn = torch.Generator().manual_seed(seed * 10**9 + step * 1000 + rank)
            picked = owned[rank][torch.randint(len(owned[rank]), (BATCH,), generator=drawn)]
            with contextlib.nullcontext() if (step + 1) % every == 0 else turn:
                _one_step(attached, models[rank], train.x[picked], train.y[picked])
            if rank == 0 and (step + 1) % every == 0:
                curves["choose"].append(accuracy(models[0], choose))
                curves["test"].append(accuracy(models[0], test))
        curves["sent"] = [(attached.meter.sent_bytes - before) / count / (clients - 1)]
        attached.detach()

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return curves


def _one_step(attached: Attached, model: nn.Module, x: Tensor, y: Tensor) -> None:
    if attached.method.samples:
        attached.estimate(lambda: functional.cross_entropy(model(x), y))
    else:
        functional.cross_entropy(model(x), y).backward()
    attached.step()


def drift(dtype: torch.dtype, steps: int) -> Mapping[int, float]:
    """How far weights are off that are moved by eps z, by -2 eps z and back, in place: the rms error by step."""
    size = 100_000
    base = (0.02 * torch.randn(size, generator=torch.Generator().manual_seed(1))).to(dtype)
    live, walk, errors = base.clone(), Walk(1), {}
    for step in range(1, steps + 1):
        (along,) = walk.directions([(step, 0, 0)], [Segment("w", 0, size)])
        for by in (EPS, -2 * EPS, EPS):
            live += (by * along).to(dtype)
        if step in (1, 10, 100, 1000):
            errors[step] = float((live.double() - base.double()).square().mean().sqrt())
    return errors
