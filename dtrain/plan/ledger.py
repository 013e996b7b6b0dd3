"""The bytes that one rank holds, by term, while a step is replayed; the largest sum is what has to fit."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["TERMS", "Ledger"]

TERMS: Mapping[str, str] = {
    "parameters": "what this rank keeps of the parameters and the model's buffers",
    "gradients": "gradients that wait for the optimizer, with the buckets that they lie in",
    "master copies": "fp32 copies of parameters in bf16, and DeepSpeed's second copy in any precision",
    "optimizer state": "what the inner optimizer keeps from step to step",
    "optimizer temporaries": "what one step of the inner optimizer allocates and frees again",
    "gathered parameters": "parameters of other shards, gathered for a forward or backward pass, with their buffers",
    "unreduced gradients": "whole gradients of a unit before they are averaged over the shards, with their buffers",
    "activations": "what forward keeps for backward, gradients of activations and other temporaries",
    "inputs": "one step's batches",
    "feedback": "residuals and estimates of error feedback, and warm starts of low rank",
    "outer parameters": "what the replicas agree on: the anchor",
    "outer momentum": "what the outer optimizer keeps",
    "other sync state": "what else a sync keeps",
    "in flight": "what an exchange holds while it is under way: captured values, messages, spare copies of feedback",
}
"""What each term holds."""


class Ledger:
    """``total``: now. ``peak``: at most. ``at_peak``: the terms then, and ``peak_during`` which phase that was."""

    def __init__(self) -> None:
        self.total = self.peak = 0
        self.phase = self.peak_during = ""
        self.at_peak: dict[str, int] = {}
        self._now: dict[str, int] = {}

    def add(self, term: str, size: float) -> None:
        """Allocate, or free where ``size`` is negative. Raises ``KeyError`` for an unknown term."""
        if term not in TERMS:
            raise KeyError(term)
        self._now[term] = self._now.get(term, 0) + int(size)
        self.total += int(size)
        if self.total > self.peak:
            self.peak, self.at_peak, self.peak_during = self.total, dict(self._now), self.phase

    def forget_peak(self) -> tuple[int, str, dict[str, int]]:
        """Begin a new peak at what is there now; returns the old one."""
        old = (self.peak, self.peak_during, self.at_peak)
        self.peak, self.peak_during, self.at_peak = self.total, self.phase, dict(self._now)
        return old

    def restore_peak(self, old: tuple[int, str, dict[str, int]]) -> None:
        """Take back an ``old`` peak if it was higher."""
        if old[0] > self.peak:
            self.peak, self.peak_during, self.at_peak = old

    def put(self, term: str, size: float) -> None:
        """Make a term this large."""
        self.add(term, int(size) - self._now.get(term, 0))

    def spike(self, term: str, size: float) -> None:
        """Allocate and free at once."""
        self.add(term, size)
        self.add(term, -int(size))

    def now(self, term: str) -> int:
        """A term's present size."""
        return self._now.get(term, 0)
