"""Trainings that `dtrain bench train` steps in blocks, one with a sync and one without communication."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from dtrain.bench.train_settings import TrainSettings
from dtrain.train.config import Config, instantiate
from dtrain.train.mesh import build_mesh
from dtrain.train.setup import build
from dtrain.train.stepping import Stepper
from dtrain.train.totals import Account
from dtrain.train.votes import Control

__all__ = ["ALONE", "Block", "Training", "block_steps"]

ALONE = {"_target_": "dtrain.local_sgd", "every_steps": 1 << 40}
"""No replica ever sends anything: what a step takes without communication between them."""


@dataclass(frozen=True)
class Block:
    """Of a step of one block on this rank: its seconds, those of exposed communication, and bytes sent."""

    seconds: float
    exposed: float
    sent: float


class Training:
    """A training that is stepped in blocks."""

    def __init__(self, config: Config) -> None:
        self._mesh = build_mesh(
            config.mesh.replicate, config.mesh.shard, cast(Literal["torch", "mpi"], config.mesh.transport)
        )
        self.parts = build(config, self._mesh)
        self._meter, self._control = self._mesh.channel.meter, Control(self._mesh.control)
        self._stepper = Stepper(self.parts, Account(self._meter, self._mesh.control.meter))

    def block(self, steps: int, lead: int = 0) -> Block:
        """Time ``steps`` steps after ``lead`` others; then nothing is under way."""
        for _ in range(lead):
            self._stepper.step()
        self._together()
        sent, exposed, started = self._meter.sent_bytes, self._meter.exposed_seconds, time.perf_counter()
        for _ in range(steps):
            self._stepper.step()
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        seconds = time.perf_counter() - started
        sent, exposed = self._meter.sent_bytes - sent, self._meter.exposed_seconds - exposed
        self.parts.attached.method.settle()
        self._together()
        return Block(seconds / steps, exposed / steps, sent / steps)

    def close(self) -> None:
        """Every rank must call it."""
        self.parts.attached.detach()
        self._mesh.control.close()
        self.parts.engine.close()
        self._mesh.close()

    def _together(self) -> None:
        self._control.barrier()


def block_steps(config: Config, settings: TrainSettings) -> tuple[int, int]:
    """Steps of a block, whole rounds of a local update; and those before it, so that what overlaps is under way."""
    sync: Any = instantiate(config.sync, "sync")
    every = getattr(sync, "every_steps", 1)
    if not isinstance(every, int):  # rounds of changing length
        return settings.block_steps, 0
    if getattr(sync, "delay", "none") != "none":
        every *= 2
    return every * math.ceil(settings.block_steps / every), every if getattr(sync, "overlap_steps", 0) else 0
