"""A loss scale that all ranks change alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dtrain.comm.runtime.attached import Attached

FUSED = "_step_supports_amp_scaling"
"""An optimizer with this attribute is given the scale to divide by itself, and its step is not left out."""


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for an optimizer whose steps go to a sync (``attach(..., forward_steps=True)``).

    torch's leaves out a step where this rank's gradients are not finite, so that ranks part. Here `step` always reaches
    the sync. Where gradients are exchanged it skips a step on all ranks or on none; the scale then falls on all of
    them, and what feedback keeps of gradients, in units of the scale, is rescaled with it. Under local updates a
    replica skips alone and has a scale of its own; all of them count the step.

    Args:
        sync: what `attach` returned.
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as of ``torch.amp.GradScaler``.

    >>> scaler = GradScaler(sync, "cuda")  # doctest: +SKIP
    >>> scaler.scale(loss).backward()  # doctest: +SKIP
    >>> scaler.unscale_(optimizer)  # then clip  # doctest: +SKIP
    >>> scaler.step(optimizer)  # doctest: +SKIP
    >>> scaler.update()  # doctest: +SKIP

    Raises ``ValueError`` for a sync that was attached without ``forward_steps=True``.
    """

    def __init__(
        self, sync: Attached, device: str = "cuda", *, init_scale: float = 2.0**16, growth_factor: float = 2.0,
        backoff_factor: float = 0.5, growth_interval: int = 2000, enabled: bool = True,
    ) -> None:  # fmt: skip
        if not sync.forwards_steps:
            raise ValueError(
                "GradScaler steps the optimizer, and this sync does not take its steps; attach with forward_steps=True"
            )
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._sync = sync

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        fused = getattr(optimizer, FUSED, False)
        if fused:  # or torch would leave unscaling to its step, which comes after the exchange
            setattr(optimizer, FUSED, False)
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            if fused:
                setattr(optimizer, FUSED, True)

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        result: float | None = optimizer.step(*args, **kwargs)
        for found in optimizer_state["found_inf_per_device"].values():
            found.fill_(float(self._sync.skipped_in_a_row > 0))
        return result

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        before = self.get_scale()
        super().update(new_scale)
        after = self.get_scale()
        if after != before and self._sync.parameters_kind == "replicated":  # deltas are in no loss scale
            self._sync.feedback.rescale(after / before)
