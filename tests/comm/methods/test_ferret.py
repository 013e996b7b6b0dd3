"""Ferret: what is told of a delta, that all replicas step alike, and that it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain import ferret
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named
from dtrain.comm.methods.ferret import LEAST, MOST, Drawn, allotted, projected
from dtrain.comm.ops import Place
from dtrain.comm.shared_seed.philox import SharedRandom
from dtrain.comm.transports.simulate import simulate
from dtrain.outer import sgd
from dtrain.testing.replicas import Replicas, common, equal
from tests.comm.zoo import draw


def told(values: Sequence[Named], round_: int = 0, *, block: int = 64, budget: int = 16, weights: object = None,
         shrink: str = "none") -> list[Combined]:  # fmt: skip
    """What all ranks make of their ``values``."""
    drawn, world = Drawn(SharedRandom(3), round_, "all"), len(values)
    counts = weights if isinstance(weights, list) else [1.0] * world
    return simulate([
        projected(each, drawn, Place(rank, world), block, budget, shrink, counts[rank])  # type: ignore[arg-type]
        for rank, each in enumerate(values)
    ])  # fmt: skip


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(0, 10000))
@settings(max_examples=100)
def test_a_budget_is_spent_to_the_last(needs: list[float], more: int) -> None:
    budget = min(len(needs) * LEAST + more, len(needs) * MOST)
    given_ = allotted(needs, budget)
    assert sum(given_) == budget and all(LEAST <= count <= MOST for count in given_)
    for mine, of_mine in zip(needs, given_, strict=True):
        for theirs, of_theirs in zip(needs, given_, strict=True):
            assert mine < theirs or of_mine >= of_theirs - 1  # who needs as much gets as much


@pytest.mark.parametrize("budget", [16, 200])
def test_cosine_and_norm_are_those_of_random_directions(budget: int) -> None:
    x = draw(1, 2000)
    found = [told([{"w": x}], number, block=2000, budget=budget)[0].values["w"] for number in range(60)]
    cosine = sum(float(y @ x / (y.norm() * x.norm())) for y in found) / len(found)
    ratio = sum(float(y.norm() / x.norm()) for y in found) / len(found)
    assert cosine == pytest.approx(math.sqrt(budget / (budget + 2000)), rel=0.1)
    assert ratio == pytest.approx(math.sqrt((budget + 2000) / budget), rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(240)  # 2,000 rounds, perhaps beside other tests
def test_the_mean_of_many_rounds_is_the_delta() -> None:
    """In blocks of different norms: each with as many directions as it is given, and none too long."""
    values = {"a": draw(1, 100), "b": 5 * draw(2, 90)}
    x = torch.cat([values["a"], values["b"]])
    mean = torch.zeros_like(x)
    for number in range(2000):
        found = told([values], number, block=50, budget=40)[0].values
        mean += torch.cat([found["a"], found["b"]]) / 2000
    for block, own in zip(mean.split(50), x.split(50), strict=True):
        assert float(block @ own / (own @ own)) == pytest.approx(1.0, abs=0.04)
    assert float(mean @ x / (x @ x)) == pytest.approx(1.0, abs=0.02)


def test_machines_leave_out_different_things() -> None:
    """Directions of their own: what four machines leave out of the same delta averages."""
    x = draw(1, 1000)
    alone, four = (told(world * [{"w": x}], block=1000, budget=50)[0].values["w"] for world in (1, 4))
    assert float((four - x).norm()) < 0.6 * float((alone - x).norm())


def test_one_block_is_a_plain_projection_to_the_bit() -> None:
    x, drawn = draw(1, 300), Drawn(SharedRandom(3), 0, "all")
    signs = drawn.block(0, 0, 16, 300)
    numbers = signs @ x / 16
    scale = float(numbers.abs().max() / 127)
    scale = float(torch.tensor(scale))
    expected = ((numbers / scale).round() @ signs) * scale
    (found,) = told([{"w": x}], block=1000)
    assert torch.equal(found.values["w"], expected)


def test_the_order_of_sums_has_no_say() -> None:
    """Integers: a matrix product adds them in any order, and they are exact."""
    signs, codes = SharedRandom(1), torch.arange(-127, 128).float()
    along = Drawn(signs, 0, "x").block(0, 0, 255, 1000)
    in_order = torch.zeros(1000, dtype=torch.float64)
    for code, direction in zip(codes, along, strict=True):
        in_order += float(code) * direction.double()
    assert torch.equal((codes @ along).double(), in_order)


def test_weights_count_and_who_has_none_is_left_out() -> None:
    x = draw(1, 50)
    values: list[Named] = [{"w": x}, {"w": torch.zeros(50)}, {"w": torch.full((50,), math.nan)}]
    results = told(values, budget=200, weights=[3.0, 1.0, 1.0], shrink="least_error")
    alone = told(values[:1], budget=200)[0].values["w"]
    for result in results:
        assert result.finite and torch.equal(result.values["w"], results[0].values["w"])
    assert float(results[0].values["w"] @ alone / (alone @ alone)) == pytest.approx(0.75 * 400 / 449, rel=0.01)
    nobody = told(values, weights=[0.0, 0.0, 1.0])
    assert not any(result.finite for result in nobody)


@pytest.mark.slow
def test_all_replicas_step_alike_and_come_nearer() -> None:
    replicas = Replicas(ferret(every_steps=2, directions=40, block=16, outer=sgd(lr=2.0)), 3, gradient=common)

    def loss() -> float:
        return sum(float((value - draw(0, value.numel())).square().sum()) for value in replicas.live(0).values())

    before = loss()
    replicas.train(120)
    assert all(equal(replicas.live(rank), replicas.live(0)) for rank in (1, 2))
    assert loss() < 0.1 * before
    sent = replicas.pieces[0].channel.meter.sent_as("round")
    assert sent == 60 * 2 * (40 + 5 + 8)


def test_it_comes_back_to_the_bit() -> None:
    whole = Replicas(ferret(every_steps=3, directions=40, block=16), 3)
    whole.train(7)
    again = whole.resumed()
    whole.train(6)
    again.train(6)
    assert all(equal(again.live(rank), whole.live(rank)) for rank in range(3))


def test_a_replica_that_diverged_is_left_out() -> None:
    replicas = Replicas(ferret(every_steps=2, directions=40, block=16), 3)
    replicas.train(3)
    replicas.pieces[2].values["layers.1.weight"] += math.nan
    replicas.train(1)
    assert [attached.method.left_out for attached in replicas.attached] == [0, 0, 1]  # type: ignore[attr-defined]
    assert equal(replicas.live(2), replicas.live(0)) and bool(replicas.live(0)["layers.1.weight"].isfinite().all())


def test_a_block_without_a_direction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"directions=4 leave 4 for the 5 blocks.*give at least 5"):
        Replicas(ferret(every_steps=2, directions=4, block=16), 1)


@pytest.mark.parametrize("wrong", [{"directions": 0}, {"block": 1.5}, {"shrink": "half"}, {"every_steps": 0}])
def test_what_makes_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ferret(**wrong)  # type: ignore[arg-type]
