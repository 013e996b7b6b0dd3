"""Steps of methods without gradients: a direction is tried, and only the loss's slope along it is used.

    l+- = loss(parameters +- eps z);   g = (l+ - l-) / (2 eps)                SPSA, Spall, IEEE TAC 37 (1992)

The parameters are moved as copies: adding and subtracting does not restore them to the bit, and the machines, each with
directions of its own, would drift apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.comm.runtime.context import Context
from dtrain.comm.shared_seed.directions import At, Walk, both_ways
from dtrain.comm.shared_seed.philox import Address
from dtrain.comm.torch_private import BatchNorm, mark_stepped

MANY_UNUSABLE = 10
"""Losses in a row that were not finite, after which a warning is raised."""


class ForwardSteps:
    """Directions that are tried in place of backward passes.

    Args:
        walk: draws the directions; ``walk.samples`` of them are tried in each step.
        eps: the distance along a direction.
        at: the direction of sample number ``sample`` in this step.
    """

    def __init__(self, context: Context, walk: Walk, eps: float, at: Callable[[int], At]) -> None:
        self._context, self.walk, self._eps, self._at = context, walk, eps, at
        self.unusable = 0  # losses that were not finite
        self.numbers: list[float] = []  # slopes along this step's directions
        self._checked = False
        self._unusable_in_a_row = 0

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        """Try the next direction on ``loss()``, a forward pass on this rank's batch; returns the mean loss.

        Call it ``walk.samples`` times before `step`. ``loss`` is called with the model moved one way and the other,
        without gradients, and must return the same for the same parameters: keep the batch; dropout draws the same
        again. Every rank must call it.

        Raises ``RuntimeError`` if it does not, and for more than ``walk.samples``.
        """
        sample, pieces = len(self.numbers), self._context.pieces
        if sample == self.walk.samples:
            raise RuntimeError(f"all {sample} directions of this step were tried; call step() before the next one")
        pieces.finish()
        base = pieces.read()
        try:
            if not self._checked:
                self._require_repeatable(loss)
                self._checked = True
            losses = []
            for values in both_ways(base, pieces.segments, self.walk, self._at(sample), self._eps):
                pieces.write(values)
                losses.append(self._loss(loss))
        finally:
            pieces.write(base)
        number = (losses[0] - losses[1]) / (2 * self._eps)
        self._unusable_in_a_row = 0 if math.isfinite(number) else self._unusable_in_a_row + 1
        self.unusable += not math.isfinite(number)
        if self._unusable_in_a_row == MANY_UNUSABLE:
            warnings.warn(
                f"{MANY_UNUSABLE} losses in a row were not finite here, at step {self._context.steps} the last "
                f"({losses}): this machine contributes nothing; look at its data, or lower the learning rate",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip
        self.numbers.append(number)
        return (losses[0] + losses[1]) / 2

    def taken(self) -> list[float]:
        """Return the slopes of this step, and clear them."""
        if len(self.numbers) != self.walk.samples:
            raise RuntimeError(
                f"{len(self.numbers)} of {self.walk.samples} directions were tried since the last step; call "
                "estimate(...) for each"
            )
        numbers, self.numbers = self.numbers, []
        return numbers

    def stepped(self) -> None:
        """Called after a step was made."""
        mark_stepped(self._context.pieces.optimizer)

    def report(self) -> str:
        return f", {self.unusable} losses not finite" if self.unusable else ""

    def _loss(self, loss: Callable[[], Tensor]) -> float:
        """The mean over this replica's ranks. Each pass of a sample draws the same random numbers."""
        worker, sample = self._context.pieces.channel.places["shard"].rank, len(self.numbers)
        at = Address("forward", self._context.steps, self._context.place.rank, sample)
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), torch.no_grad():
            seed = at.stream(str(worker)) >> 1
            # Not torch.manual_seed: without a GPU it records each call, with its stack, for one that may come.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1:
            result = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"estimate(loss) calls loss() for the mean loss, a tensor of one element; it gave {result}")
        value = value.detach().double().reshape(1)
        return float(self._context.over_shards(value, "loss")) / self._context.pieces.channel.places["shard"].size

    def _require_repeatable(self, loss: Callable[[], Tensor]) -> None:
        watch = torch.nn.modules.module.register_module_forward_hook(_refuse_statistics)
        try:
            once = self._loss(loss)
        finally:
            watch.remove()
        again = self._loss(loss)
        if once != again and not (math.isnan(once) and math.isnan(again)):
            raise RuntimeError(
                f"the loss is {once!r}, and with the same parameters {again!r}: take the batch before estimate(...), "
                "and put layers that change in forward (BatchNorm) into eval()"
            )


def _refuse_statistics(module: torch.nn.Module, inputs: object, output: object) -> None:
    """A forward hook. Raise ``RuntimeError`` for running statistics, which would differ between machines."""
    if isinstance(module, BatchNorm) and module.training and module.track_running_stats:
        raise RuntimeError(
            f"{type(module).__name__} in train() changes its statistics in every forward pass, on each machine "
            "otherwise; put it into eval()"
        )


def require_plain_sgd(inner: torch.optim.Optimizer, sync: str) -> None:
    """Raise ``ValueError`` unless ``inner`` is SGD without momentum, of one learning rate and weight decay."""
    if not isinstance(inner, torch.optim.SGD) or any(group["momentum"] for group in inner.param_groups):
        momenta = sorted({group.get("momentum", 0) for group in inner.param_groups})
        name = f"SGD with momentum {momenta[-1]}" if isinstance(inner, torch.optim.SGD) else type(inner).__name__
        raise ValueError(
            f"{sync} takes its steps itself and reads its rate from the optimizer, here {name}; give it "
            "torch.optim.SGD(lr=...) without momentum: optim=sgd optim.inner.momentum=0"
        )
    if len({(group["lr"], group["weight_decay"]) for group in inner.param_groups}) > 1:
        raise ValueError(f"{sync} has one learning rate and one weight decay; make one parameter group")
