"""CUDA's streams and events without a card: who has waited for what. Nothing is computed on them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class FakeEvent:
    """``number``: in the order of all events."""

    stream: FakeStream
    number: int


@dataclass(eq=False)
class FakeStream:
    """``waited_for``: events that it waits for, in order."""

    cuda: FakeCuda
    waited_for: list[FakeEvent] = field(default_factory=list)

    def record_event(self) -> FakeEvent:
        return FakeEvent(self, next(self.cuda.numbers))

    def wait_event(self, event: FakeEvent) -> None:
        self.waited_for.append(event)


class FakeCuda:
    """One device, whose current stream is a matter of each thread. ``default``: that of those that have chosen none."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.default = FakeStream(self)
        self._chosen = threading.local()

    def current_stream(self, device: object = None) -> FakeStream:
        stream: FakeStream = getattr(self._chosen, "stream", self.default)
        return stream

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._chosen.stream = self.current_stream(), stream
        yield
        self._chosen.stream = before

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the place of ``torch.cuda``, until the test ends."""
        replaced: dict[str, Any] = {
            "is_available": lambda: True, "is_initialized": lambda: True, "current_device": lambda: 0,
            "set_device": lambda device: None, "Stream": lambda: FakeStream(self), "stream": self.stream,
            "current_stream": self.current_stream,
        }  # fmt: skip
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)


class OnCard(Tensor):
    """A tensor that says that it is on the card. ``users``: the streams that its memory was recorded for."""

    users: list[FakeStream]

    @classmethod
    def of(cls, values: Tensor) -> OnCard:
        tensor = values.as_subclass(cls)
        tensor.users = []
        return tensor

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def record_stream(self, stream: FakeStream) -> None:  # type: ignore[override]
        self.users.append(stream)
