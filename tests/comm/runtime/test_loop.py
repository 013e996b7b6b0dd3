"""Local updates: the special cases in which methods are one, an oracle in numpy, and rounds that fail."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain import co2, diloco, local_sgd, streaming_diloco
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.feedback import Compression, NoFeedback
from dtrain.comm.methods.local_update import LocalUpdate, local_update
from dtrain.compress import error_feedback, quantize
from dtrain.outer import adam, nesterov, sgd
from dtrain.testing.replicas import Replicas, common, equal, quadratic
from tests.comm.zoo import NUMELS, named, seeds

# --- special cases --------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), seeds, st.lists(st.sampled_from(NUMELS), min_size=1, max_size=3))
@settings(max_examples=10, deadline=None)
def test_rounds_of_one_step_with_plain_sgd_are_data_parallelism(world: int, seed: int, sizes: list[int]) -> None:
    start = named(seed, sizes)
    replicas = Replicas(local_update(every_steps=1, outer=sgd(lr=1.0)), world, start=start)
    parallel = dict(start)
    for step in range(5):
        replicas.train(1)
        for fqn, x in parallel.items():
            gradients = torch.stack([quadratic(rank, step, fqn, x) for rank in range(world)])
            parallel[fqn] = x - 0.05 * gradients.mean(0)
    for fqn, x in parallel.items():
        torch.testing.assert_close(replicas.anchor[fqn], x, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("compress", [None, quantize(bits=8, block=16), error_feedback(quantize(bits=4, block=16))])
def test_diloco_with_plain_sgd_is_local_sgd(compress: Compressor | Compression | None) -> None:
    one = Replicas(diloco(every_steps=4, outer=sgd(lr=1.0), compress=compress), 3)
    other = Replicas(local_sgd(every_steps=4, compress=compress), 3)
    for _ in range(4):
        one.train(4)
        other.train(4)
        assert all(equal(one.live(rank), other.live(rank)) for rank in range(3))
    assert one.spec == other.spec


def test_local_sgd_averages_the_parameters() -> None:
    replicas = Replicas(local_sgd(every_steps=5), 3)
    for _ in range(3):
        replicas.train(4)
        trained = [
            {fqn: x - 0.05 * quadratic(rank, replicas.attached[rank].steps, fqn, x)
             for fqn, x in replicas.live(rank).items()}
            for rank in range(3)
        ]  # fmt: skip
        replicas.train(1)
        for fqn, anchor in replicas.anchor.items():
            mean = torch.stack([live[fqn] for live in trained]).double().mean(0)
            torch.testing.assert_close(anchor.double(), mean, rtol=1e-6, atol=1e-6)
            assert all(torch.equal(replicas.live(rank)[fqn], anchor) for rank in range(3))


@pytest.mark.parametrize(
    "spec", [diloco(every_steps=3), local_sgd(every_steps=3), diloco(every_steps=1, outer=sgd(lr=0.5, momentum=0.5))]
)
@pytest.mark.parametrize("world", [2, 4])
def test_the_same_data_on_all_workers_is_one_worker(spec: LocalUpdate, world: int) -> None:
    alone, together = Replicas(spec, 1, gradient=common), Replicas(spec, world, gradient=common)
    for _ in range(5):
        alone.train(spec.every_steps)
        together.train(spec.every_steps)
        assert all(equal(together.live(rank), alone.live(0)) for rank in range(world))
    for name in spec.kinds:
        assert equal(together.kept(world - 1, name), alone.kept(0, name))


def test_diloco_in_twenty_lines_of_numpy() -> None:
    world, every_steps, lr, outer_lr, momentum = 3, 4, 0.05, 0.7, 0.9
    replicas = Replicas(diloco(every_steps=every_steps), world, lr=lr)
    anchor = {fqn: value.double().numpy() for fqn, value in replicas.live(0).items()}
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
        replicas.train(every_steps)
        for rank in range(world):
            for fqn in anchor:
                np.testing.assert_allclose(replicas.kept(rank, "anchor")[fqn], anchor[fqn], rtol=1e-5, atol=2e-6)
                np.testing.assert_allclose(replicas.kept(rank, "momentum")[fqn], velocity[fqn], rtol=1e-5, atol=2e-6)


def test_with_one_replica_diloco_is_a_lookahead_and_not_the_identity() -> None:
    replicas = Replicas(diloco(every_steps=3), 1)
    start, trained = replicas.live(0), Replicas(diloco(every_steps=100), 1)
    trained.train(3)
    replicas.train(3)
    for fqn, value in start.items():
        ahead = value + 0.7 * 1.9 * (trained.live(0)[fqn] - value)
        torch.testing.assert_close(replicas.anchor[fqn], ahead, rtol=1e-5, atol=1e-6)


# --- compression ----------------------------------------------------------------------------------------------------

COMPRESSED: dict[str, Compressor | Compression] = {
    "int8": quantize(bits=8, block=64),
    "int8 ef": error_feedback(quantize(bits=8)),
    "int4 ef": error_feedback(quantize(bits=4, block=16)),
    "int2 ef": error_feedback(quantize("least_squares", bits=2, block=16)),
    "stochastic": quantize(bits=4, block=16, rounding="stochastic"),
    "bf16": cast("bf16"),
}


@pytest.mark.parametrize("compress", COMPRESSED.values(), ids=COMPRESSED)
@pytest.mark.parametrize("world", [2, 3])
def test_anchors_and_momenta_are_equal_to_the_bit(compress: Compressor | Compression, world: int) -> None:
    spec = diloco(every_steps=2, compress=compress)
    replicas = Replicas(spec, world)
    for _ in range(4):
        replicas.train(2)
        for rank in range(1, world):
            for name, kind in spec.kinds.items():
                if kind == "replicated":
                    assert equal(replicas.kept(rank, name), replicas.kept(0, name))
    assert replicas.kept(0, "momentum")


@pytest.mark.parametrize(
    "compressor",
    [quantize(bits=4, block=16), *(quantize("least_squares", bits=bits, block=32) for bits in (1, 2, 4))],
    ids=["int4", "least squares 1", "least squares 2", "least squares 4"],
)
@pytest.mark.parametrize("world", [1, 3])
def test_error_feedback_on_deltas_telescopes(world: int, compressor: Compressor) -> None:
    """How far the anchor moved == sum of the mean deltas - mean residual, over 50 rounds."""
    spec = diloco(every_steps=1, outer=sgd(lr=1.0), compress=error_feedback(compressor))
    start = named(5, [61])
    replicas = Replicas(spec, world, start=start)
    meant = {fqn: torch.zeros_like(value, dtype=torch.float64) for fqn, value in start.items()}
    for step in range(50):
        anchor = replicas.anchor
        for fqn, x in anchor.items():  # all live parameters are the anchor
            deltas = [x - (x - 0.05 * quadratic(rank, step, fqn, x)) for rank in range(world)]
            meant[fqn] += torch.stack([delta.double() for delta in deltas]).mean(0)
        replicas.train(1)
    for fqn, value in start.items():
        left = torch.stack([replicas.kept(rank, "residual")[fqn] for rank in range(world)]).double().mean(0)
        moved = value.double() - replicas.anchor[fqn].double()
        torch.testing.assert_close(moved, meant[fqn] - left, rtol=1e-5, atol=1e-5)


# --- rounds that fail, and replicas that do not count alike ----------------------------------------------------------


@pytest.mark.parametrize("compress", [None, *COMPRESSED.values()], ids=["fp32", *COMPRESSED])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_replica_that_diverged_is_left_out_and_goes_on_from_the_anchor(
    compress: Compressor | Compression | None, bad: float
) -> None:
    spec = diloco(every_steps=2, compress=compress)
    replicas, without = Replicas(spec, 3), Replicas(spec, 3)
    for one in (replicas, without):
        one.train(5)
    for one, how in ((replicas, bad), (without, 0.0)):
        one.pieces[1].values["layers.2.weight"][17] += how
    kept = replicas.kept(1, "residual")
    replicas.train(1)  # its gradient is not finite either: that step is not made
    without.train(1)
    assert [attached.method.left_out for attached in replicas.attached] == [0, 1, 0]  # type: ignore[attr-defined]
    assert [attached.method.failed_rounds for attached in replicas.attached] == [0, 0, 0]  # type: ignore[attr-defined]
    for rank in range(3):
        assert equal(replicas.live(rank), replicas.anchor)
        assert equal(replicas.kept(rank, "anchor"), replicas.anchor)
    assert not equal(replicas.anchor, without.anchor) and all(x.isfinite().all() for x in replicas.anchor.values())
    if kept:  # nothing of its own was applied, so all of it is still owed; the part that it owns has lost something
        width = -(-61 // 3)
        own = replicas.kept(1, "residual")["layers.2.weight"]
        assert torch.equal(own[:width], kept["layers.2.weight"][:width])
    replicas.train(6)
    assert all(value.isfinite().all() for rank in range(3) for value in replicas.live(rank).values())


def test_the_mean_is_of_those_that_are_left() -> None:
    replicas, apart = Replicas(local_sgd(every_steps=3), 3), Replicas(local_sgd(every_steps=100), 3)
    replicas.train(1)
    replicas.pieces[1].values["layers.0.weight"] += math.nan
    replicas.train(2)
    apart.train(3)
    for fqn, anchor in replicas.anchor.items():
        mean = (apart.live(0)[fqn] + apart.live(2)[fqn]) / 2
        torch.testing.assert_close(anchor, mean, rtol=1e-5, atol=1e-6)


def test_a_round_of_which_nobody_is_left_moves_no_anchor() -> None:
    replicas = Replicas(diloco(every_steps=2), 2)
    replicas.train(3)
    before = replicas.anchor
    for pieces in replicas.pieces:
        pieces.values["layers.1.weight"] += math.nan
    replicas.train(1)
    assert equal(replicas.anchor, before) and equal(replicas.live(1), before)
    assert [attached.method.failed_rounds for attached in replicas.attached] == [1, 1]  # type: ignore[attr-defined]


def test_replicas_count_by_their_tokens() -> None:
    replicas, apart = Replicas(local_sgd(every_steps=2), 2), Replicas(local_sgd(every_steps=100), 2)
    apart.train(2)
    replicas.train(1)
    replicas.attached[0].weigh(5)
    replicas.train(1)  # rank 0: 1 + 5, rank 1: 2
    for fqn, anchor in replicas.anchor.items():
        mean = (6 * apart.live(0)[fqn] + 2 * apart.live(1)[fqn]) / 8
        torch.testing.assert_close(anchor, mean, rtol=1e-5, atol=1e-6)
    replicas.train(2)
    assert all(equal(replicas.kept(1, name), replicas.kept(0, name)) for name in ("anchor",))


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


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (
            {"route": "ring"},
            "route is 'ring'; choose 'auto', 'two_phase', 'all_gather', 'sparse_all_reduce' or 'all_reduce'",
        ),
        ({"route": "all_reduce", "compress": quantize(bits=8)}, "is not linear, so an all-reduce cannot sum"),
        ({"route": "all_reduce", "compress": cast("bf16")}, "cannot weigh replicas; use route='two_phase'"),
        (
            {"route": "sparse_all_reduce", "compress": cast("bf16")},
            "is for sparse compressors such as topk, not for Cast(",
        ),
        ({"route": "all_gather", "outer_state": "sharded"}, "has a two-phase route of its own; leave route out"),
        ({"route": "all_reduce", "outer_state": "sharded"}, "has a two-phase route of its own; leave route out"),
    ],
)
def test_a_route_that_rounds_cannot_take(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        diloco(**chosen)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (diloco(every_steps=8), "every_steps=5, and this is every_steps=8;"),
        (diloco(every_steps=5, outer=adam(lr=0.01)), "this is outer=Adam(lr=0.01,"),
        (co2(every_steps=5), "overlap_steps=0; delay=none, and this is"),
        (streaming_diloco(every_steps=5, overlap_steps=2, layers_per_fragment=1), "overlap_steps=0"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_what_differs(other: LocalUpdate, words: str) -> None:
    saved, loaded = Replicas(diloco(every_steps=5), 1), Replicas(other, 1)
    saved.train(7)
    state = saved.attached[0].state_dict()
    loaded.pieces[0].write(saved.live(0))
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as refused:
        loaded.attached[0].load_state_dict(state)
    assert "take out its entry 'sync'" in str(refused.value) and "verify_every" not in str(refused.value)
    loaded.attached[0].load_state_dict(Replicas(other, 1).attached[0].state_dict() | {"parameters": None})


def test_a_state_of_other_fragments_is_refused_even_where_the_change_is_meant() -> None:
    saved = Replicas(streaming_diloco(every_steps=6, overlap_steps=2, layers_per_fragment=1), 1)
    saved.train(7)
    state = saved.attached[0].state_dict() | {"sync": None, "parameters": None}
    whole = Replicas(diloco(every_steps=6, outer=nesterov(lr=0.4, momentum=0.9)), 1)
    with pytest.raises(ValueError, match="this state was saved with another sync"):
        whole.attached[0].load_state_dict(state)


@pytest.mark.parametrize("what", ["step", "close_round"])
def test_nothing_is_trained_where_the_model_shows_the_anchor(what: str) -> None:
    replicas = Replicas(diloco(every_steps=5), 1)
    replicas.train(3)
    attached, live = replicas.attached[0], replicas.live(0)
    with attached.evaluation(), attached.evaluation():
        pass
    with attached.evaluation(), pytest.raises(RuntimeError, match=rf"{what}\(\) within sync.evaluation\(\)"):
        getattr(attached, what)()
    assert equal(replicas.live(0), live) and attached.steps == 3
    replicas.train(1)
