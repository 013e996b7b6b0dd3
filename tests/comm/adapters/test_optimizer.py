"""Inner optimizers that a sync can step, and those that it cannot."""

from __future__ import annotations

import pytest
import torch

from dtrain.comm.adapters.optimizer import StepGuard


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates the model again within its step"):
        StepGuard(torch.optim.LBFGS([torch.zeros(1)]))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_others_are_taken_and_step_only_for_their_sync(kind: type[torch.optim.Optimizer]) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = kind([parameter], lr=0.1)  # type: ignore[call-arg]
    guard = StepGuard(optimizer)
    parameter.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="this optimizer is stepped by its sync"):
        optimizer.step()
    with guard.opened():
        optimizer.step()
    assert float(parameter.detach()) < 0
    guard.remove()
    optimizer.step()
