"""Running statistics of BatchNorm for other parameters than the trained ones, such as a local update's outer ones.

Statistics fit only the parameters that they were gathered with. Neither a replica's statistics nor their mean over the
replicas fit the outer parameters; a few forward passes with the outer parameters give those that do.

Communication: one all-gather of means and variances for each axis. Keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dtrain.comm.ops import AllGather, Axis, Flow
from dtrain.comm.torch_private import BatchNorm


@dataclass(frozen=True)
class Norm:
    """A layer whose statistics are gathered anew, and its earlier buffers."""

    layer: BatchNorm
    buffers: dict[str, Tensor]

    def put_back(self) -> None:
        for name, value in self.buffers.items():
            self.layer.get_buffer(name).copy_(value)


def gathers(layer: nn.Module) -> bool:
    """Whether ``layer`` is a BatchNorm with running statistics."""
    return isinstance(layer, BatchNorm) and layer.running_mean is not None


class RunningStatistics:
    """The running statistics of a model's BatchNorm layers before a step, to restore if the step is skipped."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm) and gathers(layer)]
        self._norms: list[Norm] = []

    def keep(self) -> None:
        self._norms = [Norm(layer, _held(layer)) for layer in self._layers]

    def put_back(self) -> None:
        for norm in self._norms:
            norm.put_back()


@contextmanager
def gathering() -> Iterator[list[Norm]]:
    """Within it, each BatchNorm with running statistics is reset at its first call, and takes the mean of all calls.

    Yields the layers called so far. Their ``training`` flag is restored after each call.
    """
    norms: list[Norm] = []
    before: list[tuple[float | None, bool]] = []

    def begin(layer: nn.Module, inputs: object) -> None:
        if not isinstance(layer, BatchNorm) or not gathers(layer):
            return
        if all(norm.layer is not layer for norm in norms):
            norms.append(Norm(layer, _held(layer)))
            layer.reset_running_stats()
        before.append((layer.momentum, layer.training))
        layer.momentum, layer.training = None, True

    def end(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(layer, BatchNorm) and gathers(layer):
            layer.momentum, layer.training = before.pop()

    hooks = [register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True)]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()


def _held(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}


def pooled(norms: Sequence[Norm], axes: Sequence[Axis]) -> Flow[None]:
    """Combine the statistics of all ranks along ``axes``, with equal weights, on every rank."""
    for axis in axes:
        statistics = [(norm.layer.running_mean, norm.layer.running_var) for norm in norms]
        gathered = yield AllGather(
            tuple(value for pair in statistics for value in pair if value is not None), axis=axis
        )
        for (mean, variance), means, variances in zip(statistics, gathered[::2], gathered[1::2], strict=True):
            assert mean is not None and variance is not None
            variance.copy_(variances.mean(0) + means.var(0, correction=0))
            mean.copy_(means.mean(0))


def recalibrated(passes: Callable[[], object]) -> list[Norm]:
    """Run ``passes``, forward passes without gradients; returns the layers that were called.

    Raises ``ValueError`` if there was none.
    """
    with gathering() as norms:
        try:
            with torch.no_grad():
                passes()
            if not norms:
                raise ValueError(
                    "recalibrate went through no BatchNorm with running statistics; let it run the model on some "
                    "training batches, or leave it out"
                )
        except BaseException:
            for norm in norms:
                norm.put_back()
            raise
    return norms
