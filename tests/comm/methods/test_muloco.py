"""MuLoCo is DiLoCo with Muon inside and few bits with feedback: nothing of its own but a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain import attach, diloco, inner, muloco
from dtrain.comm.methods.muloco import TWO_BITS
from dtrain.outer import nesterov
from dtrain.testing import WorkerPool
from tests import torch_versions


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().mean()


def trained(method: str) -> list[torch.Tensor]:
    """The parameters after two rounds of two replicas."""
    torch.manual_seed(0)
    model = Net()
    settings = {"every_steps": 3, "outer": nesterov(lr=0.8, momentum=0.6), "compress": TWO_BITS}
    sync = attach(model, inner.muon(model, 0.02), {"muloco": muloco, "diloco": diloco}[method](**settings))  # type: ignore[operator]
    for step in range(6):
        model(
            torch.randn(4, 8, generator=torch.Generator().manual_seed(step + 10 * torch.distributed.get_rank()))
        ).backward()
        assert sync.step()
    return [p.detach().clone() for p in model.parameters()]


def test_it_is_diloco_with_muon_inside(pool: WorkerPool) -> None:
    ours, theirs = pool.run(trained, "muloco", world=2), pool.run(trained, "diloco", world=2)
    for mine, its in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def refusal() -> str:
    model = Net()
    with pytest.raises(ValueError, match="muloco is DiLoCo with Muon inside") as caught:
        attach(model, torch.optim.AdamW(model.parameters()), muloco())
    return str(caught.value)


def with_torchs_muon() -> int:
    model = Net()
    matrices, biases = ([p for p in model.parameters() if p.dim() == dims] for dims in (2, 1))
    sync = attach(model, [torch.optim.Muon(matrices), torch.optim.SGD(biases, lr=0.1)], muloco())
    sync.detach()
    return sync.steps


def test_another_inner_optimizer_is_refused_with_the_way_out(pool: WorkerPool) -> None:
    (message,) = pool.run(refusal, world=1)
    assert message == (
        "muloco is DiLoCo with Muon inside, and the inner optimizer is AdamW; give it dtrain.inner.muon(model), in "
        "dtrain train optim=muon, or take diloco"
    )


@torch_versions.MUON
def test_torchs_muon_is_one(pool: WorkerPool) -> None:
    assert pool.run(with_torchs_muon, world=1) == [0]
