"""What a run has cost so far: tokens, seconds, bytes. Survives a resume: rank 0's figures are in the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dtrain.comm.transports.meter import Meter, Worked
from dtrain.errors import ResumeError
from dtrain.launchers import strict_json


class Account:
    """The figures of one rank. ``seconds``: within training steps; evaluation and checkpoints are not in them.

    ``exposed_seconds``: those of exposed communication. ``computing_seconds``: forward, backward and optimizer, without
    exposed communication. ``encode_seconds``, ``exchange_seconds``, ``decode_seconds``: of the channel's thread, beside
    training (`Worked`).
    """

    def __init__(self, sync: Meter, control: Meter) -> None:
        self.meters = (sync, control)
        self.tokens = 0
        self.seconds = 0.0
        self.computing_seconds = 0.0
        self.exposed_seconds = 0.0
        self._before = Worked()
        for meter in self.meters:
            meter.restart()  # set-up is not part of training

    @property
    def sent_bytes(self) -> int:
        """Across the replicate axis, control messages included."""
        return sum(meter.sent_bytes for meter in self.meters)

    @property
    def split(self) -> dict[str, float]:
        """Where the time went, in seconds by name."""
        worked, before = self.meters[0].worked, self._before
        return {
            "computing_seconds": self.computing_seconds,
            "encode_seconds": before.encode + worked.encode,
            "exchange_seconds": before.exchange + worked.exchange,
            "decode_seconds": before.decode + worked.decode,
        }

    @property
    def _waited(self) -> float:
        return sum(meter.exposed_seconds for meter in self.meters)

    @property
    def exposed_fraction(self) -> float | None:
        return self.exposed_seconds / self.seconds if self.seconds else None

    @property
    def compute_utilization(self) -> float | None:
        return self.computing_seconds / self.seconds if self.seconds else None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A whole training step, the fetching of its batch included."""
        started, waited = time.perf_counter(), self._waited
        yield
        self.exposed_seconds += self._waited - waited
        self.seconds += time.perf_counter() - started

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The part of a step that computes."""
        started, waited = time.perf_counter(), self._waited
        yield
        self.computing_seconds += time.perf_counter() - started - (self._waited - waited)

    def record(self) -> dict[str, object]:
        """For a checkpoint."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "sent_bytes": self.sent_bytes,
            "exposed_seconds": self.exposed_seconds,
            **self.split,
        }

    def restore(self, record: Mapping[str, object]) -> None:
        """Undo `record`. Raises ``ResumeError`` for an invalid one."""
        try:
            figures = {name: strict_json.number(record, name) or 0 for name in self.record()}
        except ValueError as error:
            raise ResumeError(f"the checkpoint's account of its run cannot be read: {error}") from error
        self.tokens = int(figures["tokens"])
        self.seconds, self.computing_seconds = figures["seconds"], figures["computing_seconds"]
        self.exposed_seconds = figures["exposed_seconds"]
        self._before = Worked(*(figures[f"{name}_seconds"] for name in ("encode", "exchange", "decode")))
        self.meters[0].restart(sent_bytes=int(figures["sent_bytes"]))
        self.meters[1].restart()
