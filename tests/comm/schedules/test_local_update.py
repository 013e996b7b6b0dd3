"""Local updates: the special cases in which methods are one, an oracle in numpy, and rounds that fail."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain import diloco, error_feedback, local_sgd, nesterov, quantize, sgd
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.compressors.base import Compressor
from dtrain.comm.compressors.cast import cast
from dtrain.comm.drivers.simulate import simulate
from dtrain.comm.feedback import Compression, NoFeedback
from dtrain.comm.ops import Place
from dtrain.comm.routes import Combined
from dtrain.comm.schedules.local_update import LocalUpdate, local_update, local_update_round
from dtrain.comm.schedules.outer import OuterOptimizer
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from tests.comm.zoo import NUMELS, bits, draw, named, seeds

Parameters = dict[str, Tensor]
Gradient = Callable[[int, int, str, Tensor], Tensor]
"""(rank, step, fqn, parameter) -> gradient."""
SIZES = [1, 7, 61]


def quadratic(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
    """Of a bowl that is other for each rank, with noise that is other for each step."""
    return (1 + 0.3 * rank) * (x - draw(rank, x.numel())) + 0.1 * draw(1000 * rank + step, x.numel())


def common(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
    """The same data on all ranks."""
    return quadratic(0, step, fqn, x)


@dataclass
class Workers:
    """Replicas that train alone with SGD and meet every so many steps, in one process."""

    spec: LocalUpdate
    world: int
    gradient: Gradient = quadratic
    lr: float = 0.05
    start: Parameters = field(default_factory=lambda: named(5, SIZES))
    steps: int = 0

    def __post_init__(self) -> None:
        self.states = [State(self.spec.kinds) for _ in range(self.world)]
        self.live = [dict(self.start) for _ in range(self.world)]
        for state in self.states:
            for fqn, value in self.start.items():
                state.stage(fqn, "anchor", value)
            state.commit()

    def train(self) -> None:
        """The inner steps of a round."""
        for _ in range(self.spec.every_steps):
            for rank, parameters in enumerate(self.live):
                for fqn, x in parameters.items():
                    parameters[fqn] = x - self.lr * self.gradient(rank, self.steps, fqn, x)
            self.steps += 1

    def meet(self) -> list[Combined]:
        """The exchange at the end of a round; everybody goes on from the anchor."""
        combined = simulate(
            [
                local_update_round(self.spec, self.live[r], Place(r, self.world), Key(0, self.steps, r), self.states[r])
                for r in range(self.world)
            ]
        )
        for state, one in zip(self.states, combined, strict=True):
            if one.finite:
                state.commit()
            else:
                state.rollback()
        self.live = [self.kept(rank, "anchor") for rank in range(self.world)]
        return combined

    def round(self) -> list[Combined]:
        self.train()
        return self.meet()

    def kept(self, rank: int, name: str) -> Parameters:
        return {fqn: tensors[name] for fqn, tensors in self.states[rank].tensors.items() if name in tensors}

    @property
    def anchor(self) -> Parameters:
        return self.kept(0, "anchor")


def equal(one: Parameters, other: Parameters) -> bool:
    return one.keys() == other.keys() and all(torch.equal(bits(one[fqn]), bits(other[fqn])) for fqn in one)


# --- special cases --------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), seeds, st.lists(st.sampled_from(NUMELS), min_size=1, max_size=3))
@settings(max_examples=10)
def test_rounds_of_one_step_with_plain_sgd_are_data_parallelism(world: int, seed: int, sizes: list[int]) -> None:
    workers = Workers(local_update(every_steps=1, outer=sgd(lr=1.0)), world, start=named(seed, sizes))
    parallel = dict(workers.start)
    for step in range(5):
        workers.round()
        for fqn, x in parallel.items():
            gradients = torch.stack([quadratic(rank, step, fqn, x) for rank in range(world)])
            parallel[fqn] = x - workers.lr * gradients.mean(0)
    for fqn, x in parallel.items():
        torch.testing.assert_close(workers.anchor[fqn], x, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("compress", [None, quantize(bits=8, block=16), error_feedback(quantize(bits=4, block=16))])
def test_diloco_with_plain_sgd_is_local_sgd(compress: Compressor | Compression | None) -> None:
    one = Workers(diloco(every_steps=4, outer=sgd(lr=1.0), compress=compress), 3)
    other = Workers(local_sgd(every_steps=4, compress=compress), 3)
    for _ in range(4):
        one.round()
        other.round()
        assert all(equal(one.live[rank], other.live[rank]) for rank in range(3))
    assert one.spec == other.spec


def test_local_sgd_averages_the_parameters() -> None:
    workers = Workers(local_sgd(every_steps=5), 3)
    for _ in range(3):
        workers.train()
        means = {fqn: torch.stack([live[fqn] for live in workers.live]).double().mean(0) for fqn in workers.start}
        workers.meet()
        for fqn, mean in means.items():
            torch.testing.assert_close(workers.anchor[fqn].double(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "spec", [diloco(every_steps=3), local_sgd(every_steps=3), diloco(every_steps=1, outer=sgd(lr=0.5, momentum=0.5))]
)
@pytest.mark.parametrize("world", [2, 4])
def test_the_same_data_on_all_workers_is_one_worker(spec: LocalUpdate, world: int) -> None:
    alone, together = Workers(spec, 1, gradient=common), Workers(spec, world, gradient=common)
    for _ in range(5):
        alone.round()
        together.round()
        assert all(equal(together.live[rank], alone.live[0]) for rank in range(world))
    for name in spec.kinds:
        assert equal(together.kept(world - 1, name), alone.kept(0, name))


def test_diloco_in_twenty_lines_of_numpy() -> None:
    world, every_steps, lr, outer_lr, momentum = 3, 4, 0.05, 0.7, 0.9
    workers = Workers(diloco(every_steps=every_steps), world, lr=lr)
    anchor = {fqn: value.double().numpy() for fqn, value in workers.start.items()}
    velocity = {fqn: np.zeros_like(value) for fqn, value in anchor.items()}
    step = 0
    for _ in range(3):
        live = [{fqn: value.copy() for fqn, value in anchor.items()} for _ in range(world)]
        for _ in range(every_steps):
            for rank in range(world):
                for fqn in live[rank]:
                    gradient = quadratic(rank, step, fqn, torch.from_numpy(live[rank][fqn])).numpy()
                    live[rank][fqn] = live[rank][fqn] - lr * gradient
            step += 1
        for fqn in anchor:
            delta = np.mean([anchor[fqn] - live[rank][fqn] for rank in range(world)], axis=0)
            velocity[fqn] = momentum * velocity[fqn] + delta
            anchor[fqn] = anchor[fqn] - outer_lr * (delta + momentum * velocity[fqn])
        workers.round()
        for rank in range(world):
            for fqn in anchor:
                np.testing.assert_allclose(workers.kept(rank, "anchor")[fqn].numpy(), anchor[fqn], rtol=1e-5, atol=2e-6)
                np.testing.assert_allclose(
                    workers.kept(rank, "momentum")[fqn].numpy(), velocity[fqn], rtol=1e-5, atol=2e-6
                )


def test_with_one_replica_diloco_is_a_lookahead_and_not_the_identity() -> None:
    workers = Workers(diloco(every_steps=3), 1)
    workers.train()
    trained = workers.live[0]
    workers.meet()
    for fqn, start in workers.start.items():
        ahead = start + 0.7 * 1.9 * (trained[fqn] - start)
        torch.testing.assert_close(workers.anchor[fqn], ahead, rtol=1e-5, atol=1e-6)


# --- compression ----------------------------------------------------------------------------------------------------

COMPRESSED: dict[str, Compressor | Compression] = {
    "int8": quantize(bits=8, block=64),
    "int8 ef": error_feedback(quantize(bits=8)),
    "int4 ef": error_feedback(quantize(bits=4, block=16)),
    "stochastic": quantize(bits=4, block=16, rounding="stochastic"),
    "bf16": cast("bf16"),
}


@pytest.mark.parametrize("compress", COMPRESSED.values(), ids=COMPRESSED)
@pytest.mark.parametrize("world", [2, 3])
def test_anchors_and_momenta_are_equal_to_the_bit(compress: Compressor | Compression, world: int) -> None:
    workers = Workers(diloco(every_steps=2, compress=compress), world)
    for _ in range(4):
        combined = workers.round()
        for rank in range(1, world):
            assert equal(combined[rank].values, combined[0].values)
            for name, kind in workers.spec.kinds.items():
                if kind == "replicated":
                    assert equal(workers.kept(rank, name), workers.kept(0, name))
    assert workers.kept(0, "momentum")


@pytest.mark.parametrize(("outer", "world"), [(sgd(lr=1.0), 1), (sgd(lr=1.0), 3), (nesterov(), 2)])
def test_error_feedback_on_deltas_telescopes(world: int, outer: OuterOptimizer) -> None:
    """Sum of the applied deltas == sum of the mean deltas - mean residual, over 50 rounds."""
    spec = diloco(every_steps=1, outer=outer, compress=error_feedback(quantize(bits=4, block=16)))
    workers = Workers(spec, world, start=named(5, [61]))
    applied = {fqn: torch.zeros_like(value, dtype=torch.float64) for fqn, value in workers.start.items()}
    meant = {fqn: total.clone() for fqn, total in applied.items()}
    for _ in range(50):
        workers.train()
        for fqn, anchor in workers.anchor.items():
            meant[fqn] += torch.stack([(anchor - live[fqn]).double() for live in workers.live]).mean(0)
        for fqn, value in workers.meet()[0].values.items():
            applied[fqn] += value.double()
    for fqn in applied:
        left = torch.stack([workers.kept(rank, "residual")[fqn] for rank in range(world)]).double().mean(0)
        torch.testing.assert_close(applied[fqn], meant[fqn] - left, rtol=1e-5, atol=1e-5)
        if outer == sgd(lr=1.0):
            moved = workers.start[fqn].double() - workers.anchor[fqn].double()
            torch.testing.assert_close(applied[fqn], moved, rtol=1e-5, atol=1e-5)


# --- rounds that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [None, *COMPRESSED.values()], ids=["fp32", *COMPRESSED])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_replica_that_diverged_moves_nobody_and_goes_on_from_the_anchor(
    compress: Compressor | Compression | None, bad: float
) -> None:
    workers = Workers(diloco(every_steps=2, compress=compress), 3)
    workers.round()
    workers.round()
    before = [{name: workers.kept(rank, name) for name in workers.spec.kinds} for rank in range(3)]
    workers.train()
    workers.live[1]["layers.2.weight"][17] = bad
    assert [combined.finite for combined in workers.meet()] == [False] * 3
    for rank in range(3):
        assert all(equal(workers.kept(rank, name), tensors) for name, tensors in before[rank].items())
        assert equal(workers.live[rank], before[0]["anchor"])
    assert all(combined.finite for combined in workers.round())
    assert all(value.isfinite().all() for live in workers.live for value in live.values())


def test_a_round_writes_to_nothing_that_it_was_given() -> None:
    workers = Workers(diloco(every_steps=1, compress=error_feedback(quantize(bits=8))), 2)
    workers.round()
    workers.train()
    given = [{fqn: value.clone() for fqn, value in live.items()} for live in workers.live]
    kept = [{n: {f: t.clone() for f, t in workers.kept(r, n).items()} for n in workers.spec.kinds} for r in range(2)]
    flows = [
        local_update_round(workers.spec, workers.live[r], Place(r, 2), Key(0, 9, r), workers.states[r])
        for r in range(2)
    ]
    simulate(flows)
    for rank in range(2):
        assert equal(workers.live[rank], given[rank])
        assert all(equal(workers.kept(rank, name), kept[rank][name]) for name in workers.spec.kinds)


# --- construction ---------------------------------------------------------------------------------------------------


def test_what_methods_are_made_of() -> None:
    identity = Compression(cast("fp32"), NoFeedback())
    assert local_sgd(every_steps=8) == LocalUpdate(8, sgd(lr=1.0), identity, rank_order_mean)
    assert diloco() == LocalUpdate(100, nesterov(lr=0.7, momentum=0.9), identity, rank_order_mean)
    assert diloco(every_steps=3, outer=sgd()).outer == sgd()
    assert local_sgd(every_steps=2).kinds == {"anchor": "replicated"}
    assert diloco(compress=error_feedback(quantize(bits=8))).kinds == {
        "anchor": "replicated",
        "momentum": "replicated",
        "residual": "per_worker",
    }
    assert hash(diloco()) == hash(diloco())

    def largest(rows: Tensor) -> Tensor:
        return rows.amax(0)

    assert local_update(every_steps=1, outer=sgd(), combine=largest).rule is largest


MAKERS: dict[str, Callable[..., LocalUpdate]] = {
    "diloco": diloco,
    "local_sgd": local_sgd,
    "local_update": lambda **arguments: local_update(**{"outer": sgd(), **arguments}),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("every_steps", [0, -1, 2.0, 1.5, True, "8", None])
def test_a_period_that_is_no_positive_whole_number(name: str, every_steps: object) -> None:
    message = f"every_steps is {every_steps!r}; a round has a positive whole number of inner steps"
    with pytest.raises(ValueError, match=re.escape(message)):
        MAKERS[name](every_steps=every_steps)


@pytest.mark.parametrize("outer", ["nesterov", 0.7, nesterov, object()])
def test_something_that_is_no_outer_optimizer(outer: object) -> None:
    with pytest.raises(TypeError, match=r"give an outer optimizer such as nesterov\(lr=0.7, momentum=0.9\)"):
        diloco(outer=outer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=re.escape(f"outer is {outer!r}")):
        local_update(every_steps=1, outer=outer)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MAKERS)
def test_something_that_is_no_compressor(name: str) -> None:
    with pytest.raises(TypeError, match="compress is 'int8'; give a compressor"):
        MAKERS[name](every_steps=2, compress="int8")
