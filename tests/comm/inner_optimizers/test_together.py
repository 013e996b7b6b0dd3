"""Several optimizers over one model, as one and attached."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dtrain import attach, inner, local_sgd
from dtrain.testing import WorkerPool


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4))


def two(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    """Torch's own Muon for matrices, AdamW for the bias."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2])]


def gradients(model: nn.Module, step: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def test_one_step_is_a_step_of_each() -> None:
    ours, theirs = net(), net()
    optimizer, apart = inner.together(*two(ours)), two(theirs)
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        optimizer.zero_grad()
        for each in apart:
            each.step()
            each.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert len(optimizer.param_groups) == 2 and len(optimizer.state) == 3
    optimizer.param_groups[1]["lr"] = 0.5
    assert optimizer.members[1].param_groups[0]["lr"] == 0.5


def test_its_state_comes_back() -> None:
    ours = net()
    optimizer = inner.together(*two(ours))
    gradients(ours, 0)
    optimizer.step()
    other = copy.deepcopy(ours)
    again = inner.together(*two(other))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, it in ((ours, optimizer), (other, again)):
        model.zero_grad()
        gradients(model, 1)
        it.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="of 2 optimizers, and here are 1"):
        inner.together(two(other)[0]).load_state_dict(optimizer.state_dict())


def test_what_cannot_be_one_is_refused() -> None:
    model = net()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="together\\(\\) got no optimizer"):
        inner.together()
    with pytest.raises(ValueError, match=r"a parameter of shape \(8, 6\) is in two of the optimizers"):
        inner.together(*two(model), adamw)
    with pytest.raises(TypeError, match="together\\(\\) got a Sequential"):
        inner.together(adamw, model)  # type: ignore[arg-type]


def test_a_list_of_optimizers_is_attached_as_one(pool: WorkerPool) -> None:
    pool.run(attached_as_one, world=1)


def attached_as_one() -> None:
    ours, theirs = net(), net()
    optimizers, apart = two(ours), two(theirs)
    sync = attach(ours, optimizers, local_sgd(every_steps=2))
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        assert sync.step()
        for each in apart:
            each.step()
            each.zero_grad()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its)  # a round subtracts from its anchor and adds to it
    gradients(ours, 9)
    with pytest.raises(RuntimeError, match="this optimizer is stepped by its sync"):
        optimizers[1].step()
    sync.detach()
    optimizers[1].step()
