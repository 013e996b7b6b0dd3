"""A warm-up whose gradients are compressed: what feedback has not sent at its end is not lost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dtrain import diloco, every_step, local_update, post_local_sgd, streaming_diloco
from dtrain.comm.channel import Channel
from dtrain.comm.collectives.two_phase import two_phase_bytes
from dtrain.comm.compressors.compressor import AnyCompressor
from dtrain.comm.feedback import Compression
from dtrain.comm.layout import Named
from dtrain.comm.runtime.loop_spec import LoopSpec
from dtrain.comm.runtime.method import Sync
from dtrain.compress import cast, econtrol, ef21, error_feedback, powersgd, quantize, topk
from dtrain.outer import sgd
from dtrain.plans import after, by_layer, lgreco
from dtrain.testing.replicas import SIZES, Replica, Replicas, draw, equal, quadratic
from tests.comm.methods.test_methods import require_no_trace, same_after_each_step

EF2 = error_feedback(quantize(bits=2, block=16))
EF4 = error_feedback(quantize(bits=4, block=16))
LR = 0.05

OWING: dict[str, Compression] = {
    "2 bits": EF2,
    "4 bits": EF4,
    "top-k": error_feedback(topk(0.2)),
    "econtrol": econtrol(topk(0.3), eta=0.2),
    "low rank": error_feedback(powersgd(2)),
}


class Recorded:
    """Gradients, and each replica's sum of them; ``bad``: (rank, step) of one that is not finite."""

    def __init__(self, world: int, bad: tuple[int, int] = (-1, -1)) -> None:
        self.bad = bad
        self.sums: list[dict[str, Tensor]] = [{} for _ in range(world)]  # each written by one thread

    def __call__(self, rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
        gradient = quadratic(rank, step, fqn, x)
        if (rank, step) == self.bad:
            return gradient * math.nan
        self.sums[rank][fqn] = self.sums[rank].get(fqn, 0) + gradient.double()
        return gradient

    def mean(self, fqn: str) -> Tensor:
        return torch.stack([sums[fqn] for sums in self.sums]).mean(0)


def require_nothing_lost(replicas: Replicas, recorded: Recorded) -> None:
    """How far the anchor moved == lr x (the sum of all mean gradients) - the mean residual of the deltas."""
    replicas.all(lambda rank: replicas.attached[rank].close_round())
    for fqn, start in replicas.start.items():
        residuals = [
            replicas.kept(rank, "residual").get(fqn, torch.zeros_like(start)) for rank in range(replicas.world)
        ]
        moved = start.double() - replicas.anchor[fqn].double()
        left = torch.stack(residuals).double().mean(0)
        torch.testing.assert_close(moved, LR * recorded.mean(fqn) - left, rtol=1e-5, atol=1e-5)


MATRICES = {f"blocks.{number}.weight": draw(number, 120) for number in range(2)} | {"norm": draw(7, 61)}


class OfMatrices(Replica):
    """A replica of two matrices and a vector."""

    def __init__(self, channel: Channel, start: Named, lr: float) -> None:
        super().__init__(channel, start, lr)
        self.shapes = {fqn: (12, 10) if "blocks" in fqn else (value.numel(),) for fqn, value in start.items()}


@pytest.mark.parametrize("name", OWING)
@pytest.mark.parametrize("compress", [None, EF4])
@pytest.mark.parametrize("world", [1, 3])
def test_nothing_that_was_not_sent_is_lost(
    name: str, compress: Compression | None, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.testing.replicas.Replica", OfMatrices)
    recorded = Recorded(world)
    spec = local_update(
        every_steps=3, outer=sgd(lr=1.0), compress=compress, warmup_steps=7, warmup_compress=OWING[name]
    )
    replicas = Replicas(spec, world, gradient=recorded, lr=LR, start=MATRICES)
    replicas.train(7)
    owed = [replicas.kept(rank, "unsent") for rank in range(world)]
    assert any(tensor.any() for unsent in owed for tensor in unsent.values())
    assert not any(replicas.kept(rank, kept) for rank in range(world) for kept in ("residual", "estimate"))
    replicas.train(1)
    assert not any(replicas.kept(rank, "unsent") for rank in range(world))
    replicas.train(6)
    require_nothing_lost(replicas, recorded)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_first_step_that_is_skipped_is_no_excuse(rank: int) -> None:
    """Even if a round ends with it."""
    recorded = Recorded(3, bad=(rank, 5))
    spec = local_update(every_steps=1, outer=sgd(lr=1.0), warmup_steps=5, warmup_compress=EF2)
    replicas = Replicas(spec, 3, gradient=recorded, lr=LR)
    replicas.train(5)
    owed = replicas.kept(rank, "unsent")
    replicas.train(1)
    assert equal(replicas.kept(rank, "unsent"), owed) and not replicas.kept(1, "unsent")
    replicas = replicas.resumed()
    replicas.train(3)
    assert not replicas.kept(rank, "unsent")
    require_nothing_lost(replicas, recorded)


def test_a_last_step_that_is_skipped_owes_what_was_owed_before() -> None:
    recorded = Recorded(3, bad=(1, 4))
    spec = local_update(every_steps=2, outer=sgd(lr=1.0), warmup_steps=5, warmup_compress=EF2)
    replicas = Replicas(spec, 3, gradient=recorded, lr=LR)
    replicas.train(4)
    residual, before = replicas.kept(2, "residual"), [dict(sums) for sums in recorded.sums]
    replicas.train(1)
    assert equal(replicas.kept(2, "unsent"), residual)
    recorded.sums = before  # nobody has made that step
    replicas.train(4)
    require_nothing_lost(replicas, recorded)


class TwoPasses(Replica):
    """A replica whose gradients come in two backward passes, each of which is exchanged."""

    def finish(self) -> None:
        if self._exchange is None or not self.gradients or self._exchanged:
            return
        halves: list[Named] = [{fqn: share * g for fqn, g in self.gradients.items()} for share in (0.25, 0.75)]
        results = [self.channel.run(self._exchange(half), "gradients").values for half in halves]
        self.gradients = {fqn: results[0][fqn] + results[1][fqn] for fqn in self.gradients}
        self._exchanged = True


def test_it_is_added_once_however_many_backward_passes_a_step_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.testing.replicas.Replica", TwoPasses)
    recorded = Recorded(3)
    spec = local_update(every_steps=2, outer=sgd(lr=1.0), warmup_steps=5, warmup_compress=EF2)
    replicas = Replicas(spec, 3, gradient=recorded, lr=LR)
    replicas.train(9)
    require_nothing_lost(replicas, recorded)


def test_estimates_of_gradients_are_none_of_deltas() -> None:
    replicas = Replicas(diloco(every_steps=2, compress=ef21(topk(0.3)), warmup_steps=4, warmup_compress="same"), 2)
    replicas.train(3)
    assert replicas.kept(0, "mean_estimate") and replicas.kept(1, "momentum")
    replicas.train(1)
    for kept in ("estimate", "mean_estimate", "momentum", "residual", "unsent"):
        assert not replicas.kept(0, kept)


@pytest.mark.parametrize("rounds", [error_feedback(powersgd(2)), error_feedback(powersgd(1))])
def test_factors_are_carried_over_to_the_same_compressor(rounds: Compression, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.testing.replicas.Replica", OfMatrices)
    spec = diloco(every_steps=2, compress=rounds, warmup_steps=3, warmup_compress=error_feedback(powersgd(2)))
    replicas, (factor,) = Replicas(spec, 2, start=MATRICES), {*rounds.kinds} - {"residual"}
    replicas.train(2)
    assert replicas.kept(0, factor)
    replicas.train(1)
    assert bool(replicas.kept(0, factor)) == (rounds == error_feedback(powersgd(2)))
    replicas.train(4)


@pytest.mark.parametrize("compress", [None, EF4, quantize(bits=8)])
def test_its_bytes_are_those_of_what_it_sends(compress: AnyCompressor | Compression | None) -> None:
    replicas = Replicas(post_local_sgd(every_steps=5, warmup_steps=4, warmup_compress=compress), 3)
    replicas.train(8)
    spec = replicas.spec
    assert isinstance(spec, LoopSpec)
    (compression,) = spec.warmup_plan.compressions
    assert compression.by_row is not None
    expected = 4 * two_phase_bytes(list(SIZES), compression.by_row, 3)
    assert replicas.attached[0].meter.sent_as("gradients") == expected


def test_replicas_are_equal_until_it_ends_and_their_residuals_are_their_own() -> None:
    replicas = Replicas(diloco(every_steps=3, warmup_steps=6, warmup_compress=EF2, verify_every=1), 3)
    for _ in range(6):
        replicas.train(1)
        assert all(equal(replicas.live(rank), replicas.live(0)) for rank in range(3))
    assert not equal(replicas.kept(0, "unsent"), replicas.kept(1, "unsent"))
    assert equal(replicas.anchor, replicas.live(0))


def test_what_is_owed_follows_the_scale_of_the_gradients() -> None:
    replicas = Replicas(diloco(every_steps=3, warmup_steps=3, warmup_compress=EF2), 2)
    replicas.train(3)
    before, anchor = replicas.kept(0, "unsent"), replicas.anchor
    replicas.attached[0].feedback.rescale(4.0)
    assert equal(replicas.kept(0, "unsent"), {fqn: 4 * value for fqn, value in before.items()})
    assert equal(replicas.anchor, anchor)


def test_by_layer_and_by_step_too() -> None:
    plan = after(3, by_layer({"layers.2*": EF2}, default=EF4), before=EF4)
    recorded = Recorded(2)
    spec = local_update(every_steps=2, outer=sgd(lr=1.0), warmup_steps=6, warmup_compress=plan)
    replicas = Replicas(spec, 2, gradient=recorded, lr=LR)
    replicas.train(9)
    require_nothing_lost(replicas, recorded)


EQUAL: dict[str, tuple[Sync, Sync]] = {
    "a compressor that loses nothing, and fp32": (
        diloco(every_steps=2, warmup_steps=5, warmup_compress=error_feedback(cast("fp32"))),
        diloco(every_steps=2, warmup_steps=5),
    ),
    "a warm-up without end, and data parallelism in few bits": (
        diloco(every_steps=2, warmup_steps=99, warmup_compress=EF4),
        every_step(compress=EF4),
    ),
}


@pytest.mark.parametrize("which", EQUAL)
def test_two_that_are_one(which: str) -> None:
    assert same_after_each_step(*EQUAL[which])


RESUMED = {
    "4 bits": diloco(every_steps=3, compress=EF4, warmup_steps=4, warmup_compress="same"),
    "estimates": streaming_diloco(
        every_steps=6, layers_per_fragment=1, compress=ef21(topk(0.3)), warmup_steps=5,
        warmup_compress=econtrol(topk(0.3), eta=0.1),
    ),
    "low rank": diloco(every_steps=3, compress=error_feedback(powersgd(2)), warmup_steps=5, warmup_compress="same"),
    "offloaded": diloco(every_steps=3, outer_state="offloaded", warmup_steps=4, warmup_compress=EF2),
    "sharded": diloco(every_steps=3, outer_state="sharded", warmup_steps=4, warmup_compress=EF2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_stop_at_any_step_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.testing.replicas.Replica", OfMatrices)
    require_no_trace(RESUMED[name], MATRICES)


# --- bad input ------------------------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: diloco(warmup_compress=EF4), ValueError, "and there is no warm-up; give warmup_steps, or leave it out"),
    (lambda: streaming_diloco(warmup_compress="same"), ValueError, "warmup_compress is same, and there is no warm-up"),
    (
        lambda: diloco(warmup_steps=5, warmup_compress=lgreco(EF4, every=3)),
        ValueError,
        "gradients are not the deltas of the rounds; give the warm-up a fixed compression",
    ),
    (
        lambda: diloco(warmup_steps=5, compress=lgreco(EF4, every=3), warmup_compress="same"),
        ValueError,
        "learns from what it compresses",
    ),
    (
        lambda: diloco(warmup_steps=5, warmup_compress="int8"),  # type: ignore[arg-type]
        TypeError,
        "compress is 'int8'; give a compressor",
    ),
    (lambda: diloco(warmup_steps=-5, warmup_compress=EF4), ValueError, "warmup_steps is -5; give a whole number"),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD, ids=[words[:30] for _, _, words in BAD])
def test_what_a_warm_up_cannot_have(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        make()


def test_a_weak_compressor_without_feedback_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="without feedback: what it leaves out of a step is lost for good"):
        diloco(warmup_steps=5, warmup_compress=topk(0.01))


def test_a_pattern_that_matches_nothing_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match=r"by_layer: 'head\*' matches no parameter"):
        Replicas(diloco(warmup_steps=5, warmup_compress=by_layer({"head*": EF2}, default=EF4)), 1)


def test_a_state_of_another_warm_up_is_refused_with_what_differs() -> None:
    saved = Replicas(diloco(every_steps=5, warmup_steps=4, warmup_compress=EF4), 1)
    loaded = Replicas(diloco(every_steps=5, warmup_steps=4, warmup_compress=EF2), 1)
    saved.train(2)
    state = saved.attached[0].state_dict()
    loaded.pieces[0].write(saved.live(0))
    with pytest.raises(ValueError, match="warmup_plan="):
        loaded.attached[0].load_state_dict(state)
