"""One byte per machine: what it estimates, that all machines stay one to the bit, and that the log tells it all."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain import attach, one_byte
from dtrain.comm.layout import Segment
from dtrain.comm.methods.one_byte import OneByteSteps
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.shared_seed.byte_codec import decode, encode
from dtrain.comm.shared_seed.directions import walk_on
from dtrain.comm.shared_seed.update_log import read
from dtrain.testing import WorkerPool

pytestmark = pytest.mark.processes
STEPS = 30


def small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 1))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1000 * rank + step))
    return x, x.sum(1, keepdim=True)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def attached_to(model: nn.Module, lr: float = 0.02, decay: float = 0.0, **chosen: Any) -> Attached:
    sync = one_byte(**chosen)
    found = attach(model, torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay), sync, seed=11)
    assert isinstance(found.method, OneByteSteps)
    return found


def _of(sync: Attached) -> OneByteSteps:
    assert isinstance(sync.method, OneByteSteps)
    return sync.method


def trained(folder: str, chosen: dict[str, Any]) -> tuple[float, float, list[int], list[Tensor], int]:
    """First and last loss, this rank's digests by step, its weights, and the bytes that it sent a step."""
    rank, model = dist.get_rank(), small()
    sync = attached_to(model, decay=0.01, log=folder, **chosen)
    losses, digests = [], []
    before = sync.meter.sent_bytes
    for step in range(STEPS):
        loss = partial(loss_of, model, rank, step)
        losses.append(sum(sync.estimate(loss) for _ in range(sync.method.samples)))
        assert sync.step()
        digests.append(sync.digest())
    sent = sync.meter.sent_bytes - before
    sync.detach()
    return losses[0], losses[-1], digests, [p.detach() for p in model.parameters()], sent


@pytest.mark.parametrize(
    "chosen",
    [
        {"samples": 2},
        {"noise": "normal"},
        {"seeds": "common", "rule": "median"},
        {"seeds": "common", "rule": "majority"},
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_machines_stay_one_to_the_bit_and_the_log_replays_them(
    pool: WorkerPool, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    everybody = pool.run(trained, str(tmp_path), chosen)
    for first, last, digests, weights, sent in everybody:
        assert last < first or "majority" in chosen.values()
        assert digests == everybody[0][2] and len(set(digests)) == STEPS
        assert all(torch.equal(mine, other) for mine, other in zip(weights, everybody[0][3], strict=True))
        assert sent == STEPS * 3 * int(chosen.get("samples", 1))
    logs = [(tmp_path / f"replica-{rank}.log").read_bytes() for rank in range(4)]
    assert logs == 4 * logs[:1]
    found, model = read(tmp_path / "replica-0.log"), small()
    values = {fqn: p.detach().reshape(-1) for fqn, p in model.named_parameters()}
    segments = {fqn: Segment(fqn, 0, value.numel()) for fqn, value in values.items()}
    for record in found.records:
        walk_on(values, segments, found.header.walk, record.step)
    assert [record.digest for record in found.records] == everybody[0][2]
    assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), everybody[0][3], strict=True))


def on_a_line(eps: float) -> tuple[float, float, bool]:
    """A linear loss: what a machine found along its direction, what it should have, and whether nothing has moved."""
    model = nn.Linear(40, 1, bias=False)
    sync = attached_to(model, eps=eps)
    slope = torch.randn(40, generator=torch.Generator().manual_seed(dist.get_rank()))
    before = model.weight.detach().clone()
    sync.estimate(lambda: (model.weight.double() * slope).sum())
    (along,) = _of(sync).walk.directions([(0, dist.get_rank(), 0)], [Segment("weight", 0, 40)])
    return (
        decode(encode(_of(sync).forward.numbers[0])),
        float(along.double() @ slope.double()),
        torch.equal(model.weight, before),
    )


@pytest.mark.parametrize("eps", [1e-3, 1e-1])
def test_a_linear_loss_has_its_slope_found(pool: WorkerPool, eps: float) -> None:
    for found, slope, same in pool.run(on_a_line, eps, world=2):
        assert found == pytest.approx(slope, rel=0.11)  # a byte
        assert same


def spoiled(model: nn.Module, rank: int, step: int, bad: bool) -> Tensor:
    return loss_of(model, rank, step) * (math.nan if bad else 1.0)


def with_a_nan() -> tuple[list[bool], list[int], int, list[int]]:
    """Rank 1 finds nothing usable in step 1, nobody does in step 2."""
    rank, model = dist.get_rank(), small()
    sync = attached_to(model)
    ok, digests = [], []
    for step in range(4):
        bad = (step == 1 and rank == 1) or step == 2
        sync.estimate(partial(spoiled, model, rank, step, bad))
        ok.append(sync.step())
        digests.append(sync.digest())
    return ok, digests, _of(sync).forward.unusable, [sync.skipped, sync.skipped_in_a_row]


def test_a_loss_that_is_no_number_is_no_step_of_that_machine(pool: WorkerPool) -> None:
    (ok, digests, unusable, skipped), other = pool.run(with_a_nan, world=2)
    assert ok == other[0] == [True, True, False, True]
    assert digests == other[1] and digests[1] == digests[2]
    assert (unusable, other[2]) == (1, 2)
    assert skipped == other[3] == [1, 0]


def misused(case: str) -> str:
    model: nn.Module = small()
    if case == "BatchNorm":
        model = nn.Sequential(nn.BatchNorm1d(6, momentum=0.5), nn.Linear(6, 1))
        model.train()
    if case == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if case == "momentum" else 0.0)
    seen = iter(range(100))
    try:
        sync = attach(model, optimizer, one_byte())
        assert isinstance(sync.method, OneByteSteps)
        if case == "step first":
            sync.step()
        if case == "BatchNorm":
            sync.estimate(lambda: model(torch.ones(3, 6)).mean())
        if case == "no mean":
            sync.estimate(lambda: torch.zeros(3))
        if case == "a number":
            sync.estimate(lambda: 0.5)  # type: ignore[arg-type, return-value]
        if case == "another batch":
            sync.estimate(lambda: loss_of(model, 0, next(seen)))
        for _ in range(2):
            sync.estimate(lambda: loss_of(model, 0, 0))
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("adam", "here AdamW; give it torch.optim.SGD(lr=...) without momentum"),
        ("momentum", "here SGD with momentum 0.9; give it torch.optim.SGD(lr=...) without momentum"),
        ("BatchNorm", "BatchNorm1d in train() changes its statistics in every forward pass"),
        ("no mean", "a tensor of one element; it gave a tensor of shape (3,)"),
        ("a number", "a tensor of one element; it gave float"),
        ("step first", "0 of 1 directions were tried"),
        ("another batch", "take the batch before estimate(...)"),
        ("too many", "all 1 directions of this step were tried"),
    ],
)
def test_misuse_is_told(pool: WorkerPool, case: str, words: str) -> None:
    for message in pool.run(misused, case, world=2):
        assert words in message


def dropped() -> tuple[bool, int]:
    """Dropout draws the same both ways and something else in the next step, and shifts nobody's random numbers."""
    model, seen = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1)), []
    model[1].register_forward_hook(lambda module, given, out: seen.append((out == 0).flatten().tolist()))
    sync = attached_to(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for step in range(2):
        sync.estimate(partial(loss_of, model, 0, step))
        sync.step()
    return torch.equal(torch.rand(3), expected), len(set(map(tuple, seen)))


def test_random_numbers_of_the_model_are_left_alone(pool: WorkerPool) -> None:
    assert pool.run(dropped, world=2) == [(True, 2), (True, 2)]


def test_what_makes_no_sense_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"eps": 0.0}, "eps is 0.0"),
        ({"samples": 0}, "at least one direction"),
        ({"rule": "median"}, "only a mean makes sense"),
    ]
    for chosen, words in cases:
        with pytest.raises(ValueError, match=words):
            one_byte(**chosen)
