"""SPARTA: coordinates take turns, all replicas choose the same ones, and all of them at once are Local SGD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain import local_sgd, sparta
from dtrain.comm.methods.sparta import turn
from dtrain.comm.seeds import Key
from dtrain.testing.replicas import Replicas, equal


@given(st.integers(0, 200), st.sampled_from([1.0, 0.5, 0.3, 0.1, 0.005]), st.integers(0, 1000))
@settings(max_examples=40)
def test_within_a_period_every_coordinate_has_its_turn_once(n: int, density: float, seed: int) -> None:
    value, turns = torch.zeros(n), round(1 / density)
    taken = torch.cat([turn(value, density, number, Key(seed, 3, 1, "w")) for number in range(turns, 2 * turns)])
    assert sorted(taken.tolist()) == list(range(n))


def test_peers_choose_the_same_coordinates_and_other_ones_in_the_next_period() -> None:
    value = torch.zeros(100)
    mine, theirs = (turn(value, 0.1, 4, Key(7, 5, rank, "w")) for rank in (0, 1))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, turn(value, 0.1, 14, Key(7, 15, 0, "w")))


def test_all_at_once_is_local_sgd_of_one_step() -> None:
    one, other = Replicas(sparta(density=1.0), 3), Replicas(local_sgd(every_steps=1), 3)
    for _ in range(5):
        one.train(1)
        other.train(1)
        assert equal(one.live(1), one.live(0))
        for fqn, value in one.live(0).items():
            torch.testing.assert_close(value, other.live(0)[fqn], rtol=1e-5, atol=1e-6)


def test_replicas_stay_near_each_other_for_few_bytes() -> None:
    def spread(replicas: Replicas) -> float:
        values = torch.stack([replicas.live(rank)["layers.2.weight"] for rank in range(3)])
        return float(values.std(0).mean())

    averaged, alone = Replicas(sparta(density=0.2), 3), Replicas(local_sgd(every_steps=1000), 3)
    averaged.train(60)
    alone.train(60)
    assert spread(averaged) < 0.6 * spread(alone)
    sent = averaged.pieces[0].channel.meter.sent_as("coordinates")
    assert sent / 60 < 0.5 * 4 * 69 * 2 * 2 / 3


def test_at_the_end_all_parameters_are_averaged() -> None:
    replicas = Replicas(sparta(density=0.1), 3)
    replicas.train(5)
    assert not equal(replicas.live(0), replicas.live(1))
    replicas.all(lambda rank: replicas.attached[rank].close_round())
    assert all(equal(replicas.live(rank), replicas.live(0)) for rank in (1, 2))


def test_it_comes_back_to_the_bit() -> None:
    whole = Replicas(sparta(density=0.1, every_steps=2), 3)
    whole.train(7)
    again = whole.resumed()
    whole.train(6)
    again.train(6)
    assert all(equal(again.live(rank), whole.live(rank)) for rank in range(3))


def test_a_replica_that_diverged_is_left_out() -> None:
    replicas = Replicas(sparta(density=1.0), 3)
    replicas.train(2)
    replicas.pieces[2].values["layers.1.weight"] += math.nan
    replicas.train(1)
    assert [attached.method.left_out for attached in replicas.attached] == [0, 0, 1]  # type: ignore[attr-defined]
    assert equal(replicas.live(2), replicas.live(0)) and bool(replicas.live(0)["layers.1.weight"].isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"), [({"density": 0}, "density is 0"), ({"every_steps": 0}, "every_ste")]
)
def test_bad_numbers(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparta(**arguments)  # type: ignore[arg-type]


def test_replicas_whose_seeds_differ_are_refused() -> None:
    replicas = Replicas(sparta(), 2)  # they would average different coordinates
    with pytest.raises(ValueError, match="were given another sync, seed or model"):
        replicas.all(lambda rank: replicas.spec.bind(replicas.pieces[rank], rank))
