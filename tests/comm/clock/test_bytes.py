"""What the clock says is sent is what is sent: by label and op, against replicas that train."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import cast

import pytest
import torch

from dtrain.comm.clock.clock import Clock, Engine
from dtrain.comm.clock.network import Network
from dtrain.comm.clock.step import Step
from dtrain.comm.runtime.method import Sync
from dtrain.testing.replicas import Replicas, draw
from dtrain.train.config import compose, instantiate
from tests.sync_words import sync_words

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (50, 24), "layers.0.weight": (48, 24), "layers.0.bias": (7,), "layers.1.weight": (48, 24),
    "layers.1.bias": (7,), "head.weight": (24, 50),
}  # fmt: skip
STEPS = 31
CONFIGS = Path("configs")
OTHER_INNER = ("muloco", "onebit_adam")
"""Their inner optimizers are not SGD, which is all that `Replicas` have; compared with real runs in test_engines.py."""
FORWARD_ONLY = ("one_byte", "fedkseed")
ADAPTIVE = ("accordion", "lgreco_powersgd", "lgreco_quantize")
"""What they send depends on values."""


def named(name: str, *words: str) -> Sync:
    return cast(Sync, instantiate(compose([*sync_words(name), "data.path=x", "run.dir=y", *words]).sync))


def all_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize(("name", "steps"), [*((s, 31) for s in all_of("sync")), *((c, 5) for c in all_of("compress"))])
def test_every_sync_walks_and_sends_what_replicas_send(name: str, steps: int) -> None:
    sync = named(name)
    clock = Clock(sync, Step.even(SHAPES, 0.1), Network.of("link=100mbit,1ms nodes=3"), engine=Engine(rank=(1, 0)))
    clock.train(steps)
    clock.close_round()
    assert clock.meter.sent_bytes > 0
    if name in (*OTHER_INNER, *FORWARD_ONLY, *ADAPTIVE):
        return
    start = {fqn: draw(number, math.prod(shape)) for number, (fqn, shape) in enumerate(SHAPES.items())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replicas = Replicas(sync, 3, start=start, shapes=SHAPES, lr=0.01)
        replicas.train(steps)
        replicas.all(lambda rank: replicas.attached[rank].close_round())
    sent = replicas.attached[1].meter.by
    replicas.close()
    assert clock.meter.by == sent


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_forward_only_methods_send_what_replicas_send(name: str) -> None:
    words = ("sync.every_steps=10",) if name == "fedkseed" else ()
    sync = named(name, "optim=sgd", "optim.inner.momentum=0", *words)
    clock = Clock(sync, Step.even(SHAPES, 0.1), Network.of("link=100mbit nodes=2"), engine=Engine(rank=(1, 0)))
    clock.train(STEPS)
    replicas = Replicas(sync, 2, lr=1e-3, start={fqn: draw(1, math.prod(shape)) for fqn, shape in SHAPES.items()})

    def train(rank: int) -> None:
        pieces, attached = replicas.pieces[rank], replicas.attached[rank]
        for _ in range(STEPS):
            attached.estimate(lambda: torch.stack([value.square().mean() for value in pieces.values.values()]).sum())
            attached.step()

    replicas.all(train)
    sent = replicas.attached[1].meter.by
    replicas.close()
    assert clock.meter.by == sent
