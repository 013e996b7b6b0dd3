"""Error feedback: nothing is lost, nothing grows, and a step that failed left no trace."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.two_phase import two_phase
from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.compressors.quantize import Quantize, quantize
from dtrain.comm.feedback import EF14, Compression, NoFeedback, as_compression, ef21, error_feedback
from dtrain.comm.ops import Place
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from tests.comm.zoo import (
    COMPRESSORS,
    bits,
    draw,
    exchange,
    fresh_states,
    kinds_of_values,
    numels,
    per_rank,
    seeds,
    worlds,
)

CONTRACTIVE: dict[str, Compressor] = {
    "fp32": cast("fp32"),
    "bf16": cast("bf16"),
    "int8": quantize(bits=8),
    "int4": quantize(bits=4, block=64),
    "int3": quantize(bits=3, block=16),
    "int4 stochastic": quantize(bits=4, block=16, rounding="stochastic"),
    "int2 in blocks of 7": quantize(bits=2, block=7),
    "least squares, 1 bit": quantize("least_squares", bits=1, block=16),
    "least squares, 2 bits": quantize("least_squares", bits=2, block=64),
    "least squares, 4 bits": quantize("least_squares", bits=4, block=256),
}
contractive = st.sampled_from(sorted(CONTRACTIVE)).map(CONTRACTIVE.__getitem__)
Sums = dict[str, Tensor]


def residuals(states: list[State], fqn: str, like: Tensor) -> Tensor:
    return torch.stack([state.get(fqn, "residual", like) for state in states]).double()


def snapshot(states: list[State]) -> list[dict[str, dict[str, Tensor]]]:
    return [{f: {n: t.clone() for n, t in named.items()} for f, named in s.tensors.items()} for s in states]


def unchanged(states: list[State], before: list[dict[str, dict[str, Tensor]]]) -> bool:
    return all(
        state.tensors.keys() == kept.keys()
        and all(torch.equal(bits(state.tensors[f][n]), bits(t)) for f, named in kept.items() for n, t in named.items())
        for state, kept in zip(states, before, strict=True)
    )


# --- telescoping ----------------------------------------------------------------------------------------------------


def telescopes(compressor: Compressor, world: int, sizes: list[int], kind: str, seed: int, steps: int) -> None:
    """Sum of what was applied == sum of the mean gradients - mean residual, after each step, both phases included."""
    compression = error_feedback(compressor)
    states = fresh_states(compression, world)
    applied: Sums = {}
    given: Sums = {}
    largest: dict[str, float] = {}
    for step in range(steps):
        values = per_rank(seed + 7 * step, sizes, world, kind)
        combined = exchange(values, compression, states, step=step)[0]
        assert combined.finite
        for state in states:
            state.commit()
        for fqn, out in combined.values.items():
            rows = torch.stack([mine[fqn] for mine in values]).double()
            applied[fqn] = applied.get(fqn, torch.zeros_like(out, dtype=torch.float64)) + out.double()
            given[fqn] = given.get(fqn, torch.zeros_like(out, dtype=torch.float64)) + rows.mean(0)
            left = residuals(states, fqn, out).mean(0)
            size = max(float(rows.abs().max()), float(left.abs().max())) if rows.numel() else 0.0
            largest[fqn] = max(largest.get(fqn, 0.0), size)
            error = (applied[fqn] - (given[fqn] - left)).abs()
            # Round-off of a few fp32 operations in each step, each relative to the largest number so far.
            assert bool((error <= 4e-6 * (step + 1) * largest[fqn] + 1e-12).all()), (fqn, step)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("compressor", CONTRACTIVE.values(), ids=CONTRACTIVE)
def test_what_was_applied_is_what_was_given_less_the_mean_residual(compressor: Compressor, world: int) -> None:
    telescopes(compressor, world, [131], "normal", 3, steps=50)


@given(worlds, numels, contractive, kinds_of_values, seeds)
@settings(max_examples=25)
def test_it_telescopes_on_any_shape_and_values(
    world: int, sizes: list[int], compressor: Compressor, kind: str, seed: int
) -> None:
    telescopes(compressor, world, sizes, kind, seed, steps=3)


@given(worlds, numels, kinds_of_values, seeds)
@settings(max_examples=20)
def test_around_the_identity_it_is_the_dense_route(world: int, sizes: list[int], kind: str, seed: int) -> None:
    compression = error_feedback(cast("fp32"))
    states = fresh_states(compression, world)
    for step in range(3):
        values = per_rank(seed + step, sizes, world, kind)
        dense = exchange(values, as_compression(None))
        for rank, combined in enumerate(exchange(values, compression, states, step=step)):
            assert all(torch.equal(combined.values[f], dense[rank].values[f]) for f in dense[rank].values)
            states[rank].commit()
            assert all(not named["residual"].any() for named in states[rank].tensors.values())


def test_the_second_phase_counts_once_for_the_owner() -> None:
    """By hand: 2 ranks, 2 elements, 2-bit codes in blocks of 2; the answer's error is the owner's, times 2."""
    compression = error_feedback(quantize(bits=2, block=4))
    values = [{"w": torch.tensor([0.0, 1.0, 2.0, 3.5, 10.0, 11.0, 12.0, 13.4])} for _ in range(2)]
    states = fresh_states(compression, 2)
    first, second = exchange(values, compression, states)
    for state in states:
        state.commit()
    assert torch.equal(first.values["w"], second.values["w"])
    left = [state.tensors["w"]["residual"] for state in states]
    phase_one = values[0]["w"] - first.values["w"]  # both sent the same, so the mean was on the answer's grid
    assert torch.allclose(left[0], phase_one, atol=1e-5) and torch.allclose(left[1], phase_one, atol=1e-5)
    # Rank 0 alone is off the grid now: the mean of both is too, and each owner keeps the error of its half.
    values[0]["w"] = values[0]["w"] + torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0])
    before = residuals(states, "w", left[0])
    out = exchange(values, compression, states, step=1)[0].values["w"].double()
    for state in states:
        state.commit()
    corrected = torch.stack([mine["w"].double() for mine in values]) + before
    after = residuals(states, "w", left[0])
    assert torch.allclose(after.mean(0), corrected.mean(0) - out, atol=1e-5)


# --- weights, and peers that come and go -----------------------------------------------------------------------------

WEIGHTS = ([1.0, 1.0, 1.0], [3.0, 1.0, 8.0], [1.0, 0.0, 2.0], [5.0, 2.0])
"""Of the peers of a round; after the third one leaves for good, and a newcomer takes its place now and then."""


@pytest.mark.parametrize("compressor", CONTRACTIVE.values(), ids=CONTRACTIVE)
def test_a_weighted_round_sends_its_mean_less_what_its_peers_keep_of_it(compressor: Compressor) -> None:
    """The result is sum_i w_i (value_i + residual_i before - residual_i after) / sum_i w_i of those that take part.

    Of a peer of weight 0 nothing is sent, and its residual stays; the error of its own chunk's mean is kept for a time
    when it weighs as much as the others.
    """
    compression = error_feedback(compressor)
    states = fresh_states(compression, 3)
    for step in range(16):
        weights = WEIGHTS[step % len(WEIGHTS)]
        world, total = len(weights), sum(weights)
        if world == 2:
            states[2] = State(compression.feedback.kinds)  # who comes next knows nothing of the one who left
        values = per_rank(7 * step, [131, 1], world)
        flows = [
            two_phase(
                values[rank], compression, rank_order_mean, Place(rank, world), Key(0, step, rank), states[rank],
                weight=weight,
            )
            for rank, weight in enumerate(weights)
        ]  # fmt: skip
        before = {fqn: residuals(states, fqn, value) for fqn, value in values[0].items()}
        combined = simulate(flows)
        for state in states[:world]:
            state.commit()
        for fqn, result in combined[0].values.items():
            assert combined[-1].finite and torch.equal(combined[-1].values[fqn], result)
            kept = residuals(states, fqn, result) - before[fqn]
            rows = torch.stack([mine[fqn].double() for mine in values])
            expected = torch.zeros_like(rows[0])
            for rank, weight in enumerate(weights):
                expected += (weight or total / world) / total * -kept[rank] + weight / total * rows[rank]
            size = max(float(rows.abs().max()), float(before[fqn].abs().max()), float(kept.abs().max()))
            assert float((result.double() - expected).abs().max()) <= 4e-6 * size, (fqn, step)


# --- boundedness ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "name", ["bf16", "int8", "int4", "int3", "int4 stochastic", "least squares, 2 bits", "least squares, 4 bits"]
)
def test_residuals_stay_bounded_under_constant_gradients(name: str, world: int) -> None:
    compressor = CONTRACTIVE[name]
    compression = error_feedback(compressor)
    states = fresh_states(compression, world)
    values = [{kind: draw(rank, 61, kind) for kind in ("normal", "heavy", "sparse")} for rank in range(world)]
    for rank, mine in enumerate(values):  # the small ones are sent once enough of them have come together
        mine["two large"] = (500 * draw(rank, 61, "two large")).clamp(-1, 1)
    norms: dict[str, list[float]] = {kind: [] for kind in values[0]}
    for step in range(60):
        exchange(values, compression, states, step=step)
        for state in states:
            state.commit()
        for kind, seen in norms.items():
            seen.append(float(residuals(states, kind, values[0][kind]).norm(dim=1).max()))
    # Each phase leaves at most sqrt(1 - delta) of what went in, and the owner's share counts once for each rank.
    left = (1 + world) * (1 - compressor.delta) ** 0.5
    for kind, seen in norms.items():
        gradient = max(float(mine[kind].norm()) for mine in values)
        assert max(seen[30:]) <= 1.3 * max(seen[:30]) + 1e-6 * gradient, kind
        if left < 1 and not compressor.unbiased:
            assert max(seen) <= (left / (1 - left) + 1e-5) * gradient, kind


# --- transactions ---------------------------------------------------------------------------------------------------


@given(worlds, numels, contractive, seeds, st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
@settings(max_examples=25)
def test_one_bad_value_fails_the_step_everywhere_and_leaves_the_residuals(
    world: int, sizes: list[int], compressor: Compressor, seed: int, bad: float, data: st.DataObject
) -> None:
    sizes = [*sizes, 7]
    compression = error_feedback(compressor)
    states = fresh_states(compression, world)
    for step in range(2):
        exchange(per_rank(seed + step, sizes, world), compression, states, step=step)
        for state in states:
            state.commit()
    before = snapshot(states)
    values = per_rank(seed + 2, sizes, world)
    full = [value for value in values[data.draw(st.integers(0, world - 1))].values() if value.numel()]
    victim = data.draw(st.sampled_from(range(len(full))))
    full[victim][data.draw(st.integers(0, full[victim].numel() - 1))] = bad
    assert [combined.finite for combined in exchange(values, compression, states, step=2)] == [False] * world
    assert unchanged(states, before)  # staged is not stored
    for state in states:
        state.rollback()
    assert unchanged(states, before)
    # The next step is what it would have been without the bad one.
    values = per_rank(seed + 3, sizes, world)
    again = [State(compression.feedback.kinds) for _ in range(world)]
    for state, kept in zip(again, before, strict=True):
        state.load(kept)
    one, other = exchange(values, compression, states, step=3), exchange(values, compression, again, step=3)
    for rank in range(world):
        assert one[rank].finite
        assert all(torch.equal(one[rank].values[fqn], other[rank].values[fqn]) for fqn in values[rank])


def test_a_later_message_of_the_step_may_fail_the_earlier_one() -> None:
    """Two buckets, the second one bad: the first bucket's residual is rolled back with it."""
    compression = error_feedback(quantize(bits=4, block=16))
    states = fresh_states(compression, 2)
    exchange([{"a": torch.randn(9), "b": torch.randn(5)} for _ in range(2)], compression, states)
    for state in states:
        state.commit()
    before = snapshot(states)
    assert exchange([{"a": torch.randn(9)} for _ in range(2)], compression, states)[0].finite
    bad = [{"b": torch.full((5,), math.inf)}, {"b": torch.randn(5)}]
    assert not exchange(bad, compression, states)[1].finite
    for state in states:
        state.rollback()
    assert unchanged(states, before)


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compressor",
    [quantize(bits=4, block=512), quantize(bits=2, block=18), quantize(bits=4, block=450), cast("fp16")],
)
def test_a_compressor_without_contraction_is_refused(compressor: Compressor) -> None:
    wanted = f"{compressor} guarantees no contraction (delta = {compressor.delta:.3g}), so its residual may grow"
    with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
        error_feedback(compressor)
    assert ("block=" if isinstance(compressor, Quantize) else "use more bits") in str(caught.value)


def test_a_compressor_just_inside_is_accepted() -> None:
    assert isinstance(error_feedback(quantize(bits=4, block=449)).feedback, EF14)
    assert isinstance(error_feedback(quantize(bits=2, block=17)).feedback, EF14)


def test_error_feedback_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="would feed every error back twice; give it the compressor alone"):
        error_feedback(error_feedback(quantize(bits=8)))  # type: ignore[arg-type]


def test_what_may_be_given_as_compress() -> None:
    assert as_compression(None) == Compression(cast("fp32"), NoFeedback())
    assert as_compression(quantize(bits=8)) == Compression(quantize(bits=8), NoFeedback())
    wrapped = error_feedback(quantize(bits=8))
    assert as_compression(wrapped) is wrapped
    assert NoFeedback().kinds == {} and EF14().kinds == {"residual": "per_worker"}
    for nonsense in ("int8", 8, quantize, object()):
        with pytest.raises(TypeError, match=r"give a compressor, as quantize\(bits=8\), or error_feedback"):
            as_compression(nonsense)  # type: ignore[arg-type]


FADING = {
    **{name: one for name, one in COMPRESSORS.items() if one.delta > 0},
    **{f"{dtype} in one block": cast(dtype) for dtype in ("fp8_e4m3", "fp8_e5m2")},
}


@pytest.mark.parametrize("name", FADING)
@pytest.mark.parametrize("feedback", [error_feedback, lambda c: ef21(c, eta=1)], ids=["EF14", "EF21"])
def test_a_residual_that_fades_away_stays_finite(name: str, feedback: Callable[[Compressor], Compression]) -> None:
    """A parameter without gradient, as an embedding of what never occurs: its residual becomes denormal, then zero."""
    compression = feedback(FADING[name])
    states = fresh_states(compression, 2)
    for step in range(120):
        values = [{"w": draw(rank, 131) if step == 0 else torch.zeros(131)} for rank in range(2)]
        found = exchange(values, compression, states, step=step)
        assert all(one.finite for one in found), step
        for state in states:
            state.commit()
    assert all(bool(state.tensors["w"][kept].isfinite().all()) for state in states for kept in state.tensors["w"])
