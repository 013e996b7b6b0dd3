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
    """Torch's own Muon, or SGD where it has none, for matrices; AdamW for the bias."""
    matrices, biases = ([p for p in model.parameters() if (p.dim() == 2) == wanted] for wanted in (True, False))
    return [getattr(torch.optim, "Muon", torch.optim.SGD)(matrices, lr=0.02), torch.optim.AdamW(biases)]


def gradients(model: nn.Module, step: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def test_one_step_is_a_step_of_each() -> None:
    ours, theirs = net(), net()
    optimizer, apart = inner.chain(*two(ours)), two(theirs)
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
    optimizer = inner.chain(*two(ours))
    gradients(ours, 0)
    optimizer.step()
    other = copy.deepcopy(ours)
    again = inner.chain(*two(other))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, it in ((ours, optimizer), (other, again)):
        model.zero_grad()
        gradients(model, 1)
        it.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"groups of \[\d+, \d+\] parameters, and here they are of \[\d+\]"):
        inner.chain(two(other)[0]).load_state_dict(optimizer.state_dict())


def test_what_cannot_be_one_is_refused() -> None:
    model = net()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="chain\\(\\) got no optimizer"):
        inner.chain()
    with pytest.raises(ValueError, match=r"a parameter of shape \(8, 6\) is in two of the optimizers"):
        inner.chain(*two(model), adamw)
    with pytest.raises(TypeError, match="chain\\(\\) got a Sequential"):
        inner.chain(adamw, model)  # type: ignore[arg-type]


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


def test_its_states_are_those_of_its_members() -> None:
    model = net()
    optimizer = inner.chain(*two(model))
    first, foreign = next(model.parameters()), torch.zeros(2)
    assert first not in optimizer.state and foreign not in optimizer.state and not optimizer.state
    gradients(model, 0)
    optimizer.step()
    assert first in optimizer.state and optimizer.state[first] is optimizer.members[0].state[first]
    assert optimizer.state.get(foreign, "none") == "none"
    with pytest.raises(KeyError, match=r"no optimizer here steps a tensor of shape \(2,\)"):
        optimizer.state[foreign] = {}
    optimizer.members[0].param_groups[0]["params"] = []  # as DeepSpeed has it between steps
    assert optimizer.state[first] is optimizer.members[0].state[first]


def test_a_group_is_added_to_a_member_and_not_lost() -> None:
    optimizer = inner.chain(*two(net()))
    with pytest.raises(TypeError, match=r"add the group to one of its members: optimizer\.members\[0\]"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
    late = nn.Parameter(torch.zeros(2))
    optimizer.members[1].add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    optimizer.step()
    assert late.detach().all() and late in optimizer.state


def test_a_state_is_loaded_after_one_group_was_stepped_at_a_time() -> None:
    """DeepSpeed sets ``param_groups``; a loaded state makes new groups of them."""
    model = net()
    optimizer = inner.chain(*two(model))
    groups = optimizer.param_groups
    gradients(model, 0)
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="the state to load has groups of"):
        optimizer.load_state_dict(optimizer.members[0].state_dict())


def test_a_copy_steps_as_it_does() -> None:
    ours = net()
    optimizer = inner.chain(*two(ours))
    gradients(ours, 0)
    optimizer.step()
    optimizer.zero_grad()
    theirs, other = copy.deepcopy((ours, optimizer))
    for model, it in ((ours, optimizer), (theirs, other)):
        gradients(model, 1)
        it.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_member_that_needs_a_closure_is_not_attached(pool: WorkerPool) -> None:
    pool.run(refused_closure, world=1)


def refused_closure() -> None:
    model = net()
    matrices, others = ([p for p in model.parameters() if (p.dim() == 2) == whole] for whole in (True, False))
    with pytest.raises(ValueError, match="LBFGS evaluates the model again within its step"):
        attach(model, [torch.optim.AdamW(others), torch.optim.LBFGS(matrices)], local_sgd(every_steps=2))
