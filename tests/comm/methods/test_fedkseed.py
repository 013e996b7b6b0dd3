"""FedKSeed: steps along directions that never change, and weights that are a sum over all of them."""

from __future__ import annotations

import copy
import math
from typing import cast

import pytest
import torch
from torch import Tensor

from dtrain import fedkseed
from dtrain.comm.layout import Segment
from dtrain.comm.methods.fedkseed import FedKSeed, FedKSeedRounds, odds
from dtrain.testing.replicas import Parameters, Replicas, equal
from tests.comm.zoo import draw


def bowl(values: Parameters, rank: int, step: int) -> Tensor:
    """Of its own for each rank, and with noise that is other for each step."""
    away = [value.double() - draw(rank, value.numel()).double() for value in values.values()]
    noise = draw(1000 * rank + step, 1).double()
    return torch.stack([(0.5 * each.square()).sum() + 0.1 * noise * each.sum() for each in away]).sum().reshape(())


class Trying(Replicas):
    """Replicas that try directions of a bowl. ``spoiled``: (rank, step) at which the loss is no number."""

    spoiled: tuple[int, int] = (-1, -1)

    def of(self, rank: int) -> FedKSeedRounds:
        method = self.attached[rank].method
        assert isinstance(method, FedKSeedRounds)
        return method

    def _train(self, rank: int, steps: int) -> None:
        values, sync = self.pieces[rank].values, self.attached[rank]
        for _ in range(steps):
            factor = math.nan if self.spoiled == (rank, sync.steps) else 1.0
            sync.estimate(lambda: factor * bowl(values, rank, sync.steps))  # noqa: B023, called at once
            sync.step()

    def resumed(self) -> Trying:
        states = self.all(lambda rank: self.attached[rank].state_dict())
        others = Trying(self.spec, self.world, lr=self.lr, start=self.start)
        for rank in range(self.world):
            others.pieces[rank].write(self.live(rank))
        others.all(lambda rank: others.attached[rank].load_state_dict(states[rank]))
        return others

    @property
    def lr(self) -> float:
        return float(self.pieces[0].optimizer.param_groups[0]["lr"])

    def moved(self) -> Tensor:
        return torch.cat([value - self.start[fqn] for fqn, value in self.live(0).items()])


SMALL = fedkseed(every_steps=4, directions=50)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "pro"])
def test_all_have_the_same_weights_after_each_round_and_come_nearer(sampling: str) -> None:
    spec = FedKSeed(4, 400, 5e-4, "signs", sampling)  # type: ignore[arg-type]
    replicas = Trying(spec, 3, lr=0.008)
    before = float(bowl(replicas.live(0), 0, 0))
    for _ in range(30):
        replicas.train(3)
        assert not equal(replicas.live(0), replicas.live(1))
        replicas.train(1)
        assert equal(replicas.live(0), replicas.live(1)) and equal(replicas.live(0), replicas.live(2))
    assert float(bowl(replicas.live(0), 0, 0)) < 0.8 * before
    assert replicas.pieces[0].channel.meter.sent_as("round") == 30 * 2 * (4 * 8 + 4)


@pytest.mark.slow
def test_one_machine_that_always_has_a_new_direction_is_mezo() -> None:
    replicas = Trying(fedkseed(every_steps=1, directions=10**6), 1, lr=0.01)
    sync, values = replicas.of(0), {fqn: value.clone() for fqn, value in replicas.start.items()}
    for step in range(5):
        segments = [Segment(fqn, 0, value.numel()) for fqn, value in values.items()]
        along = dict(zip(values, sync.walk.directions([(0, 0, sync.chosen())], segments), strict=True))
        ways = [{fqn: value + sign * 5e-4 * along[fqn] for fqn, value in values.items()} for sign in (1, -1)]
        number = float(bowl(ways[0], 0, step) - bowl(ways[1], 0, step)) / 1e-3
        values = {fqn: value - 0.01 * number * along[fqn] for fqn, value in values.items()}
        replicas.attached[0].estimate(lambda: bowl(replicas.pieces[0].values, 0, sync.context.steps))
        replicas.attached[0].step()
    for fqn, value in replicas.live(0).items():
        torch.testing.assert_close(value, values[fqn], rtol=1e-4, atol=1e-4)


def test_the_sum_is_where_the_steps_led() -> None:
    replicas = Trying(fedkseed(every_steps=20, directions=50), 1, lr=0.01)
    replicas.train(19)
    gone = replicas.live(0)
    with replicas.attached[0].evaluation():
        assert equal(replicas.live(0), replicas.start)  # of the last round
    assert equal(replicas.live(0), gone)
    replicas.all(lambda rank: replicas.attached[rank].close_round())
    for fqn, value in replicas.live(0).items():
        torch.testing.assert_close(value, gone[fqn], rtol=1e-5, atol=1e-5)


def test_weights_never_leave_the_span_of_the_directions() -> None:
    replicas, places = Trying(fedkseed(every_steps=2, directions=6), 2, lr=0.01), []
    for _ in range(20):
        replicas.train(2)
        places.append(replicas.moved().double())
    assert int(torch.linalg.matrix_rank(torch.stack(places), rtol=1e-4)) <= 6


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_it_comes_back_to_the_bit(stop: int) -> None:
    whole = Trying(FedKSeed(4, 50, 5e-4, "signs", "pro"), 3, lr=0.01)
    whole.train(stop)
    again = whole.resumed()
    whole.train(6)
    again.train(6)
    assert all(equal(again.live(rank), whole.live(rank)) for rank in range(3))
    assert again.attached[1].numbers == whole.attached[1].numbers


def test_a_loss_that_is_no_number_is_no_step() -> None:
    replicas = Trying(SMALL, 2, lr=0.01)
    replicas.spoiled = (1, 2)
    replicas.train(4)
    assert [replicas.of(rank).forward.unusable for rank in (0, 1)] == [0, 1]
    assert [replicas.attached[rank].skipped for rank in (0, 1)] == [0, 1]
    assert equal(replicas.live(0), replicas.live(1))


def test_pro_draws_more_often_along_what_changes_the_loss() -> None:
    replicas = Trying(FedKSeed(1, 10, 5e-4, "signs", "pro"), 1, lr=1e-9)
    sync = replicas.of(0)
    sync.seen = [(100.0 if s == 7 else 1.0, 2) for s in range(10)]
    drawn = []
    for sync.context.steps in range(2000):
        drawn.append(sync.chosen())
    assert drawn.count(7) / 2000 == pytest.approx(math.e / (math.e + 9), abs=0.03)
    assert odds([1.0, 1.0]) == [1.0, 1.0]


def test_another_learning_rate_is_refused() -> None:
    replicas = Trying(SMALL, 1, lr=0.01)
    replicas.train(2)
    state = replicas.attached[0].state_dict()
    replicas.pieces[0].optimizer.param_groups[0]["lr"] = 0.02
    with pytest.raises(RuntimeError, match=r"learning rate was 0\.01 and is 0\.02"):
        replicas.train(1)
    other = Trying(SMALL, 1, lr=0.02)
    other.pieces[0].write(replicas.live(0))
    with pytest.raises(ValueError, match=r"resume with it instead of 0\.02"):
        other.attached[0].load_state_dict(state)


@pytest.mark.parametrize("name", ["own.0", "times.3"])
def test_half_a_direction_in_the_state_to_load_is_refused(name: str) -> None:
    state = copy.deepcopy(Trying(SMALL, 1).attached[0].state_dict())
    numbers = {**cast(dict[str, float], state["numbers"]), "own.0": 3, "own.0.number": 0.5, name: 1.5}
    with pytest.raises(ValueError, match=rf"{name} of the state to load is 1\.5; it is an integer"):
        Trying(SMALL, 1).attached[0].load_state_dict(state | {"numbers": numbers})


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.SGD([torch.zeros(1)], lr=0.1, weight_decay=0.1), "weight decay"),
        (torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9), "here SGD with momentum 0.9; give it"),
        (torch.optim.AdamW([torch.zeros(1)]), "here AdamW; give it"),
    ],
    ids=["decay", "momentum", "adam"],
)
def test_an_optimizer_that_does_not_go_with_it(optimizer: torch.optim.Optimizer, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SMALL.require_inner(optimizer)


@pytest.mark.parametrize(
    "wrong", [{"every_steps": 0}, {"directions": 0}, {"eps": 0.0}, {"sampling": "often"}, {"noise": "loud"}]
)
def test_what_makes_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fedkseed(**wrong)  # type: ignore[arg-type]
