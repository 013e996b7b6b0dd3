"""Muon: torch's is the oracle; which parameters it steps, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dtrain import inner
from dtrain.comm.inner_optimizers import muon as muon_module
from dtrain.comm.inner_optimizers.muon import MatrixPiece, Muon, Settings
from dtrain.comm.inner_optimizers.newton_schulz import flops, orthogonalized, orthogonalized_by_shape
from dtrain.comm.layout import Segment
from dtrain.comm.ops import Flow, Place
from dtrain.comm.transports.simulate import simulate
from dtrain.train.models.transformer import Transformer
from tests import torch_versions


class Net(nn.Module):
    """One of everything: embedding, blocks with matrices, a bias, a convolution and a gain, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 24), "conv": nn.Conv2d(3, 5, 2)})])
        self.inner_table = nn.ModuleList([nn.Embedding(4, 8)])
        self.head = nn.Linear(8, 11, bias=False)
        self.gain = nn.Parameter(torch.ones(8))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Newton-Schulz ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 7), (7, 1), (3, 5, 9)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalized(random(*shape), 5))
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 3e37])
def test_the_scale_of_a_matrix_does_not_matter(scale: float) -> None:
    matrix = random(6, 10)
    torch.testing.assert_close(orthogonalized(scale * matrix, 5), orthogonalized(matrix, 5), rtol=1e-4, atol=1e-5)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    assert not orthogonalized(torch.zeros(2, 4, 6), 5).any()
    for value in (torch.nan, torch.inf):
        matrix = random(4, 6)
        matrix[1, 2] = value
        assert not orthogonalized(matrix, 5).isfinite().all()


def test_matrices_of_one_shape_are_orthogonalized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = {f"m{number}": random(6, 4 + 2 * (number % 2), seed=number) for number in range(7)}
    together = orthogonalized_by_shape(matrices, 5)
    assert list(together) == list(matrices)
    monkeypatch.setattr("dtrain.comm.inner_optimizers.newton_schulz.BATCH_BYTES", 1)
    for name, alone in orthogonalized_by_shape(matrices, 5).items():
        torch.testing.assert_close(alone, together[name])


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def train(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: int) -> None:
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=100 * step + number) * 10.0 ** (number % 3 - 1)
        optimizer.step()


@torch_versions.MUON
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_take_the_steps_of_torchs_muon(nesterov: bool) -> None:
    shapes = [(12, 12), (8, 32), (32, 8)]
    ours, theirs = ([nn.Parameter(random(*shape, seed=n)) for n, shape in enumerate(shapes)] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 5}
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    train(reference, list(theirs), 20)
    optimizer = Muon(ours, Settings(**settings), ns_dtype=torch.bfloat16)
    train(optimizer, list(ours), 20)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=2e-3)  # both iterate in bf16, torch from another scale
        torch.testing.assert_close(optimizer.state[mine]["momentum_buffer"], reference.state[its]["momentum_buffer"])


def test_all_others_take_the_steps_of_adamw_to_the_bit() -> None:
    net = Net()
    other = copy.deepcopy(net)
    optimizer = inner.muon(net, 0.01, weight_decay=0.2)
    theirs: list[Any] = [other.table.weight, other.inner_table[0].weight, other.gain, *(b.bias for b in _layers(other))]
    decayed = [other.head.weight]
    reference = torch.optim.AdamW(
        [{"params": theirs, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}], lr=0.01, betas=(0.9, 0.95)
    )
    for step in range(5):
        for number, (mine, its) in enumerate(zip(net.parameters(), other.parameters(), strict=True)):
            mine.grad = random(*mine.shape, seed=50 * step + number)
            its.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    mine_of = dict(net.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter in reference.state:
            assert torch.equal(mine_of[name], parameter), name
        else:
            assert "momentum_buffer" in optimizer.state[mine_of[name]], name


def _layers(net: Net) -> list[Any]:
    return list(cast(nn.ModuleDict, net.blocks[0]).values())


def test_it_steps_matrices_and_convolutions_of_the_blocks() -> None:
    net = Net()
    optimizer = inner.muon(net)
    names = {id(p): name for name, p in net.named_parameters()}
    matrices, decayed, plain = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert matrices == ["blocks.0.up.weight", "blocks.0.conv.weight"]
    assert decayed == ["head.weight"]
    assert sorted(plain) == ["blocks.0.conv.bias", "blocks.0.up.bias", "gain", "inner_table.0.weight", "table.weight"]
    assert optimizer.param_groups[2]["weight_decay"] == 0.0
    net.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Net has no matrix in the members of an nn\.ModuleList"):
        inner.muon(net)


def test_patterns_choose_other_matrices() -> None:
    net = Net()
    optimizer = inner.muon(net, matrices=["head.*"])
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [(11, 8)]
    with pytest.raises(ValueError, match=r"'heads\.\*' names no parameter; there are gain, "):
        inner.muon(net, matrices=["heads.*"])
    with pytest.raises(ValueError, match=r"names gain of shape \(8,\)"):
        inner.muon(net, matrices=["gain"])


def test_a_matrix_that_does_not_fit_its_owner_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon_module, "_memory_of", lambda device: 2000)
    with pytest.raises(ValueError, match=r"up\.weight is a matrix of 24 x 8: .* on one rank, and cpu has 0\.0 GB"):
        inner.muon(Net(), matrices=["*up.weight"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"ns_steps": 0}, "ns_steps is 0"),
        ({"ns_steps": True}, "ns_steps is True"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"betas": 0.9}, r"betas is 0.9; give AdamW's two"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"momentum": None}, "momentum is None"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_numbers_outside_their_range_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inner.muon(Net(), **wrong)


def test_its_state_survives_torchs_own_state_dict() -> None:
    net = Net()
    optimizer = inner.muon(net)
    train(optimizer, list(net.parameters()), 3)
    other = copy.deepcopy(net)
    fresh = inner.muon(other)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for it, model in ((optimizer, net), (fresh, other)):
        train(it, list(model.parameters()), 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_closure_is_evaluated_with_gradients() -> None:
    net = Net()
    optimizer = inner.muon(net)

    def closure() -> float:
        loss = torch.stack([p.square().sum() for p in net.parameters()]).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0


def test_two_shards_share_the_work_of_the_default_model_evenly() -> None:
    from dtrain.comm.inner_optimizers.owners import balanced

    model = Transformer(vocab_size=256, dim=128, layers=4, heads=4, max_length=128)
    matrices = {n: p.shape for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2}
    costs = {name: flops(shape[0], shape[1], steps=5) for name, shape in matrices.items()}
    for ranks, most in ((2, 0.6), (4, 0.3)):
        owner = balanced(costs, ranks)
        loads = [sum(costs[name] for name in costs if owner[name] == rank) for rank in range(ranks)]
        assert max(loads) <= most * sum(costs.values())


def test_a_matrix_without_elements_is_stepped() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})
    model["blocks"][0].register_parameter("none", nn.Parameter(torch.zeros(0, 6)))  # type: ignore[index]
    optimizer = inner.muon(model)
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [(4, 4), (0, 6)]
    train(optimizer, list(model.parameters()), 2)
    assert orthogonalized(torch.zeros(3, 0, 6), 5).shape == (3, 0, 6)


def test_a_copy_steps_as_it_does() -> None:
    net = Net()
    optimizer = inner.muon(net)
    train(optimizer, list(net.parameters()), 2)
    optimizer.zero_grad()
    other, copied = copy.deepcopy((net, optimizer))
    for it, model in ((optimizer, net), (copied, other)):
        train(it, list(model.parameters()), 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_loaded_state_leaves_the_work_shared_and_a_copy_does_it_alone() -> None:
    net = Net()
    optimizer, runs = inner.muon(net), []
    matrices = {p: [MatrixPiece(tuple(p.shape), Segment(str(p.dim()), 0, p.numel()))] for p in _matrices(optimizer)}
    held = [{pieces[0].fqn: pieces[0].segment for pieces in matrices.values()}]

    def run(flow: Flow[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        runs.append(flow)
        return simulate([flow])[0]

    optimizer.share(matrices, held, Place(0, 1), run, whole=True)
    train(optimizer, list(net.parameters()), 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, list(net.parameters()), 1)
    assert len(runs) == 2
    other, copied = copy.deepcopy((net, optimizer))
    train(copied, list(other.parameters()), 1)
    assert len(runs) == 2


def _matrices(optimizer: Muon) -> list[Tensor]:
    return list(optimizer.param_groups[0]["params"])


def test_patterns_see_every_name_of_a_tied_weight() -> None:
    net = Net()
    net.head.weight = net.table.weight
    optimizer = inner.muon(net, matrices=["head.*", "table.*"])
    assert [p is net.table.weight for p in optimizer.param_groups[0]["params"]] == [True]
    assert not any(p is net.head.weight for group in inner.muon(net).param_groups[:1] for p in group["params"])
    with pytest.raises(ValueError, match=r"matrices is '\*head\*'; give a list of patterns: \['\*head\*'\]"):
        inner.muon(net, matrices="*head*")
