"""The rows of the local-update loop: where two methods are one, oracles in numpy, and a stop at every single step."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from dtrain import (
    co2,
    delayed_diloco,
    diloco,
    eager_diloco,
    every_step,
    local_sgd,
    local_update,
    post_local_sgd,
    slowmo,
    streaming_diloco,
)
from dtrain.comm.layout import messages
from dtrain.comm.methods.co2 import gap_aware
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.outer_optimizers import Round
from dtrain.comm.runtime import loop as rounds
from dtrain.comm.runtime.loop_spec import OuterState
from dtrain.comm.runtime.method import Sync
from dtrain.compress import cast, error_feedback, quantize
from dtrain.outer import adam, fedhyper, nesterov, sgd
from dtrain.plans import lgreco
from dtrain.rounds import lengths, power, qsr
from dtrain.testing.replicas import Parameters, Replicas, common, equal, quadratic
from tests.comm.zoo import draw, named

E3M0 = quantize("e3m0", block=16)
STREAMING = streaming_diloco(
    every_steps=6, layers_per_fragment=1, overlap_steps=2, compress=error_feedback(quantize(bits=4, block=16))
)
EF4 = error_feedback(quantize(bits=4, block=16))
METHODS: dict[str, LocalUpdate] = {
    "local_sgd": local_sgd(every_steps=3),
    "post_local_sgd": post_local_sgd(every_steps=3, warmup_steps=4),
    "slowmo": slowmo(every_steps=3),
    "diloco": diloco(every_steps=3),
    "diloco, adam": diloco(every_steps=3, outer=adam(lr=0.1)),
    "streaming": streaming_diloco(every_steps=6, layers_per_fragment=1, overlap_steps=2),
    "streaming, early": streaming_diloco(every_steps=6, layers_per_fragment=1, overlap_steps=1, first_round="early"),
    "delayed": delayed_diloco(every_steps=3),
    "eager": eager_diloco(every_steps=3),
    "co2": co2(every_steps=3),
    "local_sgd, lengths": local_sgd(every_steps=lengths([2, 4, 3])),
    "slowmo, power law": slowmo(every_steps=power(steps=20, rounds=5, power=1.7)),
    "diloco, by the rate": diloco(every_steps=qsr(alpha=0.1, base=2, warmup_steps=3)),
    "streaming, lengths": streaming_diloco(every_steps=lengths([4, 7, 5]), layers_per_fragment=1, overlap_steps=2),
    "streaming, early, lengths": streaming_diloco(
        every_steps=lengths([4, 6, 3]), layers_per_fragment=1, overlap_steps=1, first_round="early"
    ),
    "delayed, lengths": delayed_diloco(every_steps=lengths([3, 5, 2])),
    "eager, lengths": eager_diloco(every_steps=lengths([3, 5, 2])),
    "co2, power law": co2(every_steps=power(steps=20, rounds=5, power=1.7)),
}


def same_after_each_step(one: Sync, other: Sync, *, world: int = 3, steps: int = 14) -> bool:
    """Whether live parameters are equal to the bit at every step."""
    first, second = Replicas(one, world), Replicas(other, world)
    for _ in range(steps):
        first.train(1)
        second.train(1)
        if not all(equal(first.live(rank), second.live(rank)) for rank in range(world)):
            return False
    return True


HEAVY = sgd(lr=0.7, momentum=0.5)
EQUAL: dict[str, tuple[Sync, Sync]] = {
    "Streaming of one fragment is DiLoCo": (
        streaming_diloco(every_steps=4, layers_per_fragment=0, overlap_steps=0, outer=nesterov()),
        diloco(every_steps=4),
    ),
    "Streaming of fragments that are not staggered is DiLoCo": (
        streaming_diloco(
            every_steps=4, layers_per_fragment=1, overlap_steps=0, staggered=False, outer=nesterov(), compress=E3M0
        ),
        diloco(every_steps=4, compress=E3M0),
    ),
    "CO2 without penalty and clip is delayed DiLoCo with heavy ball": (
        co2(every_steps=4, lr=0.7, momentum=0.5, gap="none", clip=None),
        delayed_diloco(every_steps=4, outer=HEAVY),
    ),
    "CO2 with a penalty of 1 has none": (
        co2(every_steps=4, lr=0.7, momentum=0.5, gap=1, clip=1e6),
        delayed_diloco(every_steps=4, outer=HEAVY),
    ),
    "FedHyper that does not learn is Local SGD": (
        diloco(every_steps=3, outer=fedhyper(kappa=0)),
        local_sgd(every_steps=3),
    ),
    "SlowMo without momentum is Local SGD": (slowmo(every_steps=3, momentum=0), local_sgd(every_steps=3)),
    "a warm-up without end is data parallelism": (post_local_sgd(every_steps=2, warmup_steps=99), every_step()),
    "as before DiLoCo": (diloco(every_steps=2, warmup_steps=99), every_step()),
    "and Streaming DiLoCo": (streaming_diloco(every_steps=3, layers_per_fragment=1, warmup_steps=99), every_step()),
    "after its warm-up it is Local SGD": (post_local_sgd(every_steps=3, warmup_steps=0), local_sgd(every_steps=3)),
    "feedback of a compressor that loses nothing is none": (
        diloco(every_steps=3, compress=error_feedback(cast("fp32"))),
        diloco(every_steps=3),
    ),
    "outer heavy ball has one name": (
        diloco(every_steps=3, outer=HEAVY),
        local_update(every_steps=3, outer=HEAVY),
    ),
}


@pytest.mark.parametrize("which", EQUAL)
def test_two_methods_that_are_one(which: str) -> None:
    assert same_after_each_step(*EQUAL[which])


def test_eager_with_one_replica_is_diloco() -> None:
    assert same_after_each_step(eager_diloco(every_steps=4), diloco(every_steps=4), world=1)


def test_slowmo_at_a_constant_rate_is_outer_heavy_ball() -> None:
    one, other = (
        Replicas(slowmo(every_steps=3, lr=0.7, momentum=0.5), 3),
        Replicas(diloco(every_steps=3, outer=HEAVY), 3),
    )
    for _ in range(4):
        one.train(3)
        other.train(3)
        for fqn, anchor in one.anchor.items():
            torch.testing.assert_close(anchor, other.anchor[fqn], rtol=1e-6, atol=1e-6)


def test_slowmo_puts_its_momentum_in_units_of_the_inner_rate() -> None:
    replicas = Replicas(slowmo(every_steps=1, lr=1.0, momentum=0.5), 1)
    x = replicas.live(0)["layers.1.weight"].double()
    slow = torch.zeros_like(x)
    for step, lr in enumerate((0.1, 0.05, 0.0, 0.02)):
        replicas.pieces[0].optimizer.param_groups[0]["lr"] = lr
        gradient = quadratic(0, step, "", x.float()).double()
        if lr:
            slow = 0.5 * slow + gradient
            x = x - lr * slow
        replicas.train(1)
        torch.testing.assert_close(replicas.anchor["layers.1.weight"].double(), x, rtol=1e-5, atol=1e-6)


def restarts(step: int, every: int = 24) -> float:
    """A cosine that begins anew."""
    return 0.1 * 0.5 * (1 + math.cos(math.pi * (step % every) / every)) + 1e-6


def by_schedule(replicas: Replicas, steps: int) -> None:
    for _ in range(steps):
        for pieces in replicas.pieces:
            pieces.optimizer.param_groups[0]["lr"] = restarts(replicas.attached[0].steps)
        replicas.train(1)


@pytest.mark.parametrize("every", [6, 12])
def test_slowmo_holds_where_the_inner_rate_changes_within_a_round(every: int) -> None:
    """Momentum in units of a round's last rate, which may be next to nothing, or of a rate that rises, threw it far."""
    replicas, plain = (
        Replicas(spec, 2, start={"w": 10 * torch.ones(32)}, lr=0.1)
        for spec in (slowmo(every_steps=every), local_sgd(every_steps=every))
    )
    far = 0.0
    for _ in range(10):
        by_schedule(replicas, 12)
        by_schedule(plain, 12)
        far = max(far, float((replicas.anchor["w"] - plain.anchor["w"]).abs().max()))
    assert far < 10  # where it began
    assert float((replicas.anchor["w"] - plain.anchor["w"]).abs().max()) < 1


def test_slowmo_divides_by_the_mean_rate_of_a_round() -> None:
    replicas = Replicas(slowmo(every_steps=2, momentum=0.5), 1, start={"w": torch.zeros(3)})
    outer, x, slow, last = 0.0, torch.zeros(3), torch.zeros(3), 0.0
    for rates in ((0.1, 0.02), (0.04, 0.04), (0.05, 0.07)):
        before = x.clone()
        for rate in rates:
            replicas.pieces[0].optimizer.param_groups[0]["lr"] = rate
            x = x - rate * quadratic(0, replicas.attached[0].steps, "w", x)
            replicas.train(1)
        outer = sum(rates) / 2
        slow = 0.5 * min(1.0, last / outer if last else 1.0) * slow + (before - x) / outer
        x, last = before - outer * slow, outer
        torch.testing.assert_close(replicas.anchor["w"], x)


def test_the_rates_of_a_round_go_through_a_checkpoint() -> None:
    whole = Replicas(slowmo(every_steps=6), 2)
    by_schedule(whole, 9)
    again = whole.resumed()
    by_schedule(whole, 9)
    by_schedule(again, 9)
    assert all(equal(whole.live(rank), again.live(rank)) for rank in range(2))


def test_parameters_that_keep_all_of_their_own_are_trained_alone() -> None:
    spec = streaming_diloco(every_steps=4, layers_per_fragment=1, overlap_steps=2, mix=1.0)
    together, alone = Replicas(spec, 3), Replicas(diloco(every_steps=100), 3)
    for _ in range(11):
        together.train(1)
        alone.train(1)
        assert all(equal(together.live(rank), alone.live(rank)) for rank in range(3))
    assert not equal(together.anchor, named(5, [1, 7, 61]))


def test_streaming_alone_with_plain_sgd_is_training() -> None:
    spec = streaming_diloco(every_steps=4, layers_per_fragment=1, overlap_steps=0, outer=sgd(lr=1.0))
    one, plain = Replicas(spec, 1), Replicas(diloco(every_steps=100), 1)
    one.train(12)
    plain.train(12)
    for fqn, value in one.live(0).items():
        torch.testing.assert_close(value, plain.live(0)[fqn], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("world", [2, 4])
def test_the_same_data_on_all_replicas_is_one_replica(name: str, world: int) -> None:
    spec = METHODS[name]
    alone, together = Replicas(spec, 1, gradient=common), Replicas(spec, world, gradient=common)
    for _ in range(13):
        alone.train(1)
        together.train(1)
        assert all(equal(together.live(rank), together.live(0)) for rank in range(world))
        if spec.delay != "eager":  # which counts on others that are a round late
            assert equal(together.live(0), alone.live(0))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_declared_replicated_is_equal_to_the_bit_at_every_step(name: str) -> None:
    spec = METHODS[name]
    replicas = Replicas(spec, 3)
    for _ in range(14):
        replicas.train(1)
        replicas.all(lambda rank: replicas.attached[rank].method.settle())
        for kept, kind in spec.kinds.items():
            if kind == "replicated":
                assert all(equal(replicas.kept(rank, kept), replicas.kept(0, kept)) for rank in (1, 2))


# --- oracles in numpy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_streaming_in_numpy(mix: float) -> None:
    """H = 4, two fragments, overlap 1: what is captured at t meets the anchor at t + 1, after that step."""
    world, lr, outer_lr, momentum = 2, 0.05, 0.4, 0.9
    start = named(3, [5, 9])
    spec = streaming_diloco(every_steps=4, layers_per_fragment=1, overlap_steps=1, mix=mix)
    replicas = Replicas(spec, world, start=start)
    anchor = {fqn: value.double().numpy() for fqn, value in start.items()}
    live = [{fqn: value.copy() for fqn, value in anchor.items()} for _ in range(world)]
    velocity = {fqn: np.zeros_like(value) for fqn, value in anchor.items()}
    under_way: dict[str, np.ndarray] = {}
    for step in range(1, 17):
        for rank in range(world):
            for fqn, x in live[rank].items():
                live[rank][fqn] = x - lr * quadratic(rank, step - 1, fqn, torch.from_numpy(x)).double().numpy()
        for number, fqn in enumerate(start):
            if (step - 1 - 2 * number) % 4 == 0 and step - 1 >= 4 + 2 * number:
                velocity[fqn] = momentum * velocity[fqn] + under_way[fqn]
                anchor[fqn] = anchor[fqn] - outer_lr * (under_way[fqn] + momentum * velocity[fqn])
                for rank in range(world):
                    live[rank][fqn] = mix * live[rank][fqn] + (1 - mix) * anchor[fqn]
            if (step - 2 * number) % 4 == 0 and step >= 4 + 2 * number:
                under_way[fqn] = np.mean([anchor[fqn] - live[rank][fqn] for rank in range(world)], axis=0)
        replicas.train(1)
        for rank in range(world):
            for fqn in start:
                np.testing.assert_allclose(replicas.live(rank)[fqn], live[rank][fqn], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(replicas.kept(rank, "anchor")[fqn], anchor[fqn], rtol=1e-4, atol=1e-5)


def test_co2_in_numpy() -> None:
    """x(t+1) = x(t) - lr clip(momentum m + D(t-1) / gap), and the live parameters start each round from x(t)."""
    world, lr, tau, momentum, limit = 2, 0.05, 3, 0.5, 0.2
    start = named(3, [11])
    replicas = Replicas(co2(every_steps=tau, momentum=momentum, clip=limit), world, start=start, lr=lr)
    (fqn,) = start
    x = [start[fqn].double().numpy()]
    m, step, delta = np.zeros(11), 0, None
    for number in range(5):
        live = [x[-1].copy() for _ in range(world)]
        for _ in range(tau):
            for rank in range(world):
                gradient = quadratic(rank, step, fqn, torch.from_numpy(live[rank])).double().numpy()
                live[rank] = live[rank] - lr * gradient
            step += 1
        stale, delta = delta, x[-1] - np.mean(live, axis=0)
        if stale is None:
            x.append(x[-1])  # nothing has arrived yet
        else:
            gap = 1 + np.abs(x[-1] - x[-2]) / (lr * tau)
            m = np.clip(momentum * m + stale / (gap if number > 1 else 1), -limit, limit)
            x.append(x[-1] - m)
        replicas.train(tau)
        np.testing.assert_allclose(replicas.anchor[fqn], x[-1], rtol=1e-4, atol=1e-5)
        assert all(equal(replicas.live(rank), replicas.anchor) for rank in range(world))
    assert float(np.abs(m).max()) == limit  # it did clip


def test_the_gap_grows_with_what_the_anchor_has_moved_and_is_never_below_one() -> None:
    here, there = torch.zeros(3), torch.tensor([0.0, 0.3, -0.6])
    assert gap_aware(here, there, Round(inner_lr=0.1, every_steps=3)).tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert float(gap_aware(here, there, Round(inner_lr=0.0, every_steps=3))) == 1


def test_eager_in_numpy() -> None:
    world, lr, tau = 3, 0.05, 2
    start = named(3, [11])
    replicas = Replicas(eager_diloco(every_steps=tau, outer=sgd(lr=0.7)), world, start=start, lr=lr)
    (fqn,) = start
    anchors = [start[fqn].double().numpy() for _ in range(world)]
    last, step = [np.zeros(11) for _ in range(world)], 0
    for _ in range(4):
        live = [anchor.copy() for anchor in anchors]
        for _ in range(tau):
            for rank in range(world):
                gradient = quadratic(rank, step, fqn, torch.from_numpy(live[rank])).double().numpy()
                live[rank] = live[rank] - lr * gradient
            step += 1
        fresh = [anchors[rank] - live[rank] for rank in range(world)]
        mean = np.mean(last, axis=0)
        for rank in range(world):
            anchors[rank] = anchors[rank] - 0.7 * (mean + (fresh[rank] - last[rank]) / world)
        last = fresh
        replicas.train(tau)
        for rank in range(world):
            np.testing.assert_allclose(replicas.kept(rank, "anchor")[fqn], anchors[rank], rtol=1e-4, atol=1e-5)


# --- what is under way ----------------------------------------------------------------------------------------------

RESUMED = {
    **METHODS,
    "streaming, 4 bits with feedback": STREAMING,
    "co2, 8 bits with feedback": co2(every_steps=4, compress=error_feedback(quantize(bits=8, block=16))),
    "fedhyper": streaming_diloco(every_steps=4, layers_per_fragment=1, outer=fedhyper(kappa=0.3)),
    "eager, E3M0": eager_diloco(every_steps=3, compress=E3M0),
    "lgreco on deltas": diloco(every_steps=1, compress=lgreco(error_feedback(quantize(bits=4, block=16)), every=3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_stop_at_any_step_leaves_no_trace(name: str) -> None:
    require_no_trace(RESUMED[name])


def require_no_trace(spec: LocalUpdate, start: Parameters | None = None) -> None:
    """A run that was stopped and resumed after any step of two rounds is the one that was never saved."""
    longest = spec.every_steps if spec.lengths is None else 7
    stops, further = 2 * longest + 4, longest + 1
    never, whole = Replicas(spec, 3, start=start), Replicas(spec, 3, start=start)
    seen = []
    for _ in range(stops + further):
        never.train(1)
        seen.append(looked_at(never))
    for step in range(1, stops + 1):
        whole.train(1)
        again = whole.resumed()
        again.train(further)
        tensors, numbers = looked_at(again)
        those, its = seen[step + further - 1]
        assert all(equal(mine, other) for mine, other in zip(tensors, those, strict=True)) and numbers == its


def looked_at(replicas: Replicas) -> tuple[list[Parameters], object]:
    """Parameters, all that is kept, and the numbers of rank 0."""
    kinds, ranks = replicas.spec.kinds, range(replicas.world)  # type: ignore[attr-defined]
    tensors = [replicas.kept(rank, kept) for rank in ranks for kept in kinds]
    return [*map(replicas.live, ranks), *tensors], copy.deepcopy(replicas.attached[0].numbers)


def test_a_round_that_failed_on_its_way_is_resumed_as_failed() -> None:
    replicas = Replicas(STREAMING, 2)
    replicas.train(5)
    for pieces in replicas.pieces:
        pieces.values["layers.0.weight"] += math.nan
    replicas.train(1)  # captured, and nobody's part can be used
    again = replicas.resumed()
    for one in (replicas, again):
        one.train(4)
    assert replicas.attached[0].method.failed_rounds >= 1  # type: ignore[attr-defined]
    assert all(equal(again.live(rank), replicas.live(rank)) for rank in range(2))
    assert again.attached[0].numbers == replicas.attached[0].numbers


@pytest.mark.parametrize("state", ["replicated", "sharded", "offloaded"])
def test_in_the_warm_up_the_anchor_is_what_the_replicas_hold(state: OuterState) -> None:
    """So that what is evaluated, saved or exported there is trained."""
    replicas = Replicas(diloco(every_steps=2, warmup_steps=5, outer_state=state), 2)
    replicas.train(3)
    live = replicas.live(0)

    def shown(rank: int) -> Parameters:
        with replicas.attached[rank].evaluation():
            return replicas.live(rank)

    assert all(equal(one, live) for one in replicas.all(shown))
    replicas.all(lambda rank: replicas.attached[rank].method.settle())
    assert equal(replicas.anchor, live)
    replicas.train(1)
    assert replicas.all(lambda rank: replicas.attached[rank].close_round()) == [False, False]
    replicas.all(lambda rank: replicas.attached[rank].method.settle())
    assert equal(replicas.anchor, replicas.live(0)) and not equal(replicas.live(0), live)


@pytest.mark.parametrize("steps", [11, 12])
@pytest.mark.parametrize("name", METHODS)
def test_at_the_end_nothing_that_was_learned_is_left_behind(name: str, steps: int) -> None:
    """Within a round and where one has just set out: the models are then the anchor."""
    replicas = Replicas(METHODS[name], 2)
    replicas.train(steps)
    replicas.all(lambda rank: replicas.attached[rank].close_round())
    assert all(not fragment.reductions for fragment in replicas.attached[0].method.cadence.fragments)  # type: ignore[attr-defined]
    if METHODS[name].delay != "eager":
        assert equal(replicas.kept(1, "anchor"), replicas.anchor)
    assert all(equal(replicas.live(rank), replicas.kept(rank, "anchor")) for rank in range(2))
    again = replicas.all(lambda rank: replicas.attached[rank].close_round())
    assert again == [False, False]


@pytest.mark.parametrize("name", ["co2, 8 bits with feedback", "eager, E3M0"])
def test_messages_move_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Replicas(RESUMED[name], 3), Replicas(RESUMED[name], 3)
    whole.train(9)
    monkeypatch.setattr(rounds, "messages", partial(messages, elements=1))
    cut.train(9)
    fragments = cut.attached[0].method.cadence.fragments  # type: ignore[attr-defined]
    assert max(len(reduction.handles) for fragment in fragments for reduction in fragment.reductions) > 1
    again = cut.resumed()
    for one in (whole, cut, again):
        one.train(5)
        assert all(equal(one.live(rank), whole.live(rank)) for rank in range(3))


def test_a_fragment_travels_while_nobody_waits_for_it() -> None:
    replicas = Replicas(STREAMING, 3)
    replicas.train(6)
    for attached in replicas.attached:
        (reduction,) = attached.method.cadence.fragments[0].reductions  # type: ignore[attr-defined]
        assert all(handle._done.wait(30) for handle in reduction.handles)


def test_what_was_under_way_at_the_end_counts() -> None:
    closed, plain = Replicas(delayed_diloco(every_steps=3, outer=sgd()), 1), Replicas(local_sgd(every_steps=3), 1)
    closed.train(3)
    plain.train(3)
    closed.all(lambda rank: closed.attached[rank].close_round())
    assert equal(closed.anchor, plain.anchor)


def test_a_fragment_under_way_is_not_sent_twice() -> None:
    """With outer SGD the anchor moves by what was trained, once: alone, nothing is lost and nothing is doubled."""
    spec = streaming_diloco(every_steps=4, layers_per_fragment=1, overlap_steps=2, outer=sgd(lr=1.0), mix=0.0)
    replicas = Replicas(spec, 1, gradient=lambda rank, step, fqn, x: torch.ones_like(x), lr=1.0)
    start = replicas.live(0)
    replicas.train(8)  # fragment 0: captured at 4, merged at 6, captured at 8
    moved = float((start["layers.0.weight"] - replicas.live(0)["layers.0.weight"])[0])
    assert moved == pytest.approx(4 + 2, abs=1e-5)  # the two steps of the overlap are given up
    replicas.all(lambda rank: replicas.attached[rank].close_round())
    assert float((start["layers.0.weight"] - replicas.anchor["layers.0.weight"])[0]) == pytest.approx(6, abs=1e-5)


@pytest.mark.slow
def test_plain_training_lowers_the_distance_under_every_method() -> None:
    for name, spec in METHODS.items():
        replicas = Replicas(spec, 2, gradient=common)
        replicas.train(60)
        for fqn, anchor in replicas.anchor.items():
            assert float((anchor - draw(0, anchor.numel())).norm()) < float(draw(0, anchor.numel()).norm()), (name, fqn)


# --- construction ---------------------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], object], str]] = [
    (
        lambda: streaming_diloco(every_steps=5, overlap_steps=5),
        "overlap_steps is 5 with every_steps=5: what is under way",
    ),
    (lambda: streaming_diloco(overlap_steps=-1), "overlap_steps is -1 with every_steps=100"),
    (lambda: streaming_diloco(mix=1.5), "mix is 1.5; the share of this replica's own parameters lies in [0, 1]"),
    (lambda: streaming_diloco(layers_per_fragment=-1), "layers_per_fragment is -1; give a whole number of blocks"),
    (lambda: streaming_diloco(pattern="random"), "pattern is 'random'; choose 'strided' or 'sequential'"),  # type: ignore[arg-type]
    (lambda: streaming_diloco(first_round="late"), "first_round is 'late'; choose 'full' or 'early'"),  # type: ignore[arg-type]
    (lambda: streaming_diloco(fragments_by_name=[["a"], []]), "a fragment without a pattern would be empty"),
    (lambda: co2(gap="huge"), "gap is 'huge'; choose 'gap_aware', 'none', a number of at least 1"),  # type: ignore[arg-type]
    (lambda: co2(gap=0.5), "gap is 0.5; choose"),
    (lambda: co2(clip=0), "clip is 0; give the largest absolute value of an element, or None"),
    (lambda: slowmo(momentum=1.0), "momentum is 1.0; it lies in [0, 1)"),
    (lambda: post_local_sgd(every_steps=2, warmup_steps=-1), "warmup_steps is -1; give a whole number of steps"),
    (lambda: local_update(every_steps=2, outer=sgd(), delay="late"), "delay is 'late'; choose"),  # type: ignore[arg-type]
    (lambda: adam(lr=0), "lr is 0; an outer learning rate is positive"),
    (lambda: adam(lr=0.1, betas=(0.9, 1.0)), "betas are (0.9, 1.0); both lie in [0, 1)"),
    (lambda: adam(lr=0.1, eps=0), "eps is 0; it is positive"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_bad_numbers_are_refused_with_the_way_out(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# --- guard and gauges -----------------------------------------------------------------------------------------------


def test_an_anchor_with_a_flipped_bit_is_found_and_repaired() -> None:
    replicas = Replicas(local_update(every_steps=2, outer=nesterov(), verify_every=3), 3)
    replicas.train(5)
    replicas.attached[1].state.tensors["layers.2.weight"]["momentum"][7] += 1e-3
    with pytest.warns(RuntimeWarning, match=re.escape("differed on replicas [1] and was replaced by the others'")):
        replicas.train(1)
    assert [attached.repairs for attached in replicas.attached] == [1, 1, 1]
    for name in ("anchor", "momentum"):
        assert all(equal(replicas.kept(rank, name), replicas.kept(0, name)) for rank in (1, 2))
    replicas.train(6)
    assert replicas.attached[0].repairs == 1


def test_what_is_each_replicas_own_is_not_compared() -> None:
    spec = eager_diloco(every_steps=2)
    replicas = Replicas(local_update(every_steps=2, outer=spec.outer, delay="eager", verify_every=1), 3)
    replicas.train(6)
    assert replicas.attached[0].repairs == 0


def test_gauges_tell_how_far_replicas_drift_and_whether_they_agree() -> None:
    apart, together = Replicas(local_sgd(every_steps=4), 3), Replicas(local_sgd(every_steps=4), 3, gradient=common)
    for replicas in (apart, together):
        replicas.train(4)
    found = apart.attached[1].gauges
    assert found["drift"] > found["mean_delta"] > 0 and -1 < found["delta_cosine"] < 0.999
    assert together.attached[1].gauges["delta_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["staleness"] == 0 and found["sent_bytes.round"] == apart.attached[1].meter.sent_as("round")
    late = Replicas(STREAMING, 3)
    late.train(10)
    assert late.attached[0].gauges["staleness"] == 2 and late.attached[0].gauges["sent_bytes.fragment 0"] > 0


def test_bytes_are_counted_by_fragment() -> None:
    replicas = Replicas(streaming_diloco(every_steps=4, layers_per_fragment=1), 2)
    replicas.train(12)
    meter = replicas.pieces[0].channel.meter
    sent = [meter.sent_as(f"fragment {number}") for number in range(3)]
    assert sent[0] < sent[1] < sent[2] and meter.sent_as("round") == 0  # 1, 7 and 61 elements


def test_methods_in_units_of_the_inner_rate_want_one() -> None:
    for spec in (slowmo(), co2()):
        replicas = Replicas(local_sgd(every_steps=2), 1)
        replicas.pieces[0].optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.5})
        with pytest.raises(ValueError, match=re.escape("and the parameter groups have [0.05, 0.5]; give them one")):
            spec.bind(replicas.pieces[0], 0)
    co2(gap="none").bind(replicas.pieces[0], 0)


def test_the_largest_exchange_is_its_fragments_share() -> None:
    """What streaming sends at once is what DiLoCo would send of that fragment; the votes alone are sent for each."""
    start = {f"blocks.{number}.weight": draw(number, 1000 * (number + 1)) for number in range(3)}
    streaming = Replicas(streaming_diloco(every_steps=6, layers_per_fragment=1, compress=E3M0), 4, start=start)
    whole = Replicas(diloco(every_steps=6, compress=E3M0), 4, start=start)
    for replicas in (streaming, whole):
        replicas.train(18)
    meter, at_once = streaming.pieces[0].channel.meter, whole.pieces[0].channel.meter.sent_as("round") / 3
    largest = max(meter.sent_as(f"fragment {number}") / rounds for number, rounds in enumerate((3, 2, 2)))
    assert largest <= at_once * 3000 / 6000 + 15


def test_fedhypers_rate_follows_the_cosine_of_two_rounds() -> None:
    replicas = Replicas(diloco(every_steps=2, outer=fedhyper(kappa=0.5)), 2)
    anchors, expected = [replicas.anchor], 0.0
    deltas: list[torch.Tensor] = []
    for _ in range(4):
        replicas.train(2)
        anchors.append(replicas.anchor)
        deltas.append(torch.cat([t.double() for t in replicas.kept(0, "last_delta").values()]))
        if len(deltas) > 1:
            cosine = torch.cosine_similarity(deltas[-1], deltas[-2], dim=0)
            expected = min(4.0, max(-0.8, expected + 0.5 * float(cosine)))
        assert replicas.attached[1].method.cadence.fragments[0].scalar == pytest.approx(expected, abs=1e-4)  # type: ignore[attr-defined]
        for fqn, delta in replicas.kept(0, "last_delta").items():
            moved = anchors[-2][fqn] - anchors[-1][fqn]
            torch.testing.assert_close(moved, (1 + expected) * delta, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="kappa is -1; give 0 or more"):
        fedhyper(kappa=-1)
