"""Every compressor under every feedback: identities to round-off of fp64, low rank, plans, and joint messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar
from typing import cast as cast_

import pytest
import torch
from torch import Tensor

from dtrain import onebit_adam
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives import exchange as collective
from dtrain.comm.collectives.exchange import consolidate, together
from dtrain.comm.collectives.routes import Route
from dtrain.comm.collectives.two_phase import two_phase_bytes
from dtrain.comm.compressors.compressor import AnyCompressor
from dtrain.comm.compressors.lowrank import LowRank, orthonormal
from dtrain.comm.feedback import Compression
from dtrain.comm.layout import Matrix, Segment, matrices
from dtrain.comm.ops import AllGather, AllReduce, Flow, Place
from dtrain.comm.plans.plan import Plan, as_plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State
from dtrain.comm.transports.meter import Meter, metered
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import cast, compeft, econtrol, ef21, error_feedback, powersgd, quantize, randk, sign, topk
from dtrain.plans import accordion, after, by_layer, lgreco
from tests.comm.zoo import draw, exchange, fresh_states, per_rank, square

BIASED: dict[str, AnyCompressor] = {
    "top-k": topk(0.05),
    "random-k": randk(0.1),
    "int4": quantize(bits=4, block=64),
    "e3m0": quantize("e3m0", block=64),
    "int1, least squares": quantize("least_squares", bits=1, block=64),
    "int2, least squares": quantize("least_squares", bits=2, block=64),
    "int4, least squares": quantize("least_squares", bits=4, block=256),
    "sign": sign(block=64),
    "compeft": compeft(block=64),
    "e5m2": cast("fp8_e5m2", block=64),
    "PowerSGD": powersgd(2),
}
FEEDBACKS: dict[str, Callable[..., Compression]] = {
    "EF14": error_feedback,
    "EF21": lambda c: ef21(c, eta=1),
    "EF21-SGDM": ef21,
    "EControl": lambda c: econtrol(c, eta=0.1),
}
SIZES = (64 * 48, 7, 131, 0, 1)


def doubles(step: int, world: int) -> list[dict[str, Tensor]]:
    return [{fqn: value.double() for fqn, value in mine.items()} for mine in per_rank(step, SIZES, world)]


def mean_of(states: list[State], fqn: str, name: str, like: Tensor) -> Tensor:
    return torch.stack([state.get(fqn, name, like) for state in states]).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize(
    ("compressor", "route", "world"),
    [
        *((compressor, "auto", 3) for compressor in BIASED),
        *((compressor, "all_gather", 3) for compressor in BIASED),
        *(("top-k", route, world) for route in ("two_phase", "sparse_all_reduce") for world in (3, 6)),
    ],
)
def test_nothing_is_lost_to_round_off_of_fp64(compressor: str, route: Route, world: int, feedback: str) -> None:
    """Both phases included: sum of results = sum of means - mean residual, and the estimates' mean is what all hold."""
    plan = FEEDBACKS[feedback](BIASED[compressor])
    states = fresh_states(plan, world)
    applied: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for step in range(20):
        values = doubles(step, world)
        first, *others = exchange(values, plan, states, step=step, route=route)
        for state in states:
            state.commit()
        for fqn, value in first.values.items():
            assert all(torch.equal(other.values[fqn], value) for other in others)
            applied[fqn] = applied.get(fqn, torch.zeros_like(value)) + value
            meant[fqn] = meant.get(fqn, torch.zeros_like(value)) + torch.stack([v[fqn] for v in values]).mean(0)
    for fqn, total in applied.items():
        scale = float(meant[fqn].abs().max()) if total.numel() else 1.0
        if "residual" in plan.kinds:
            left = mean_of(states, fqn, "residual", total)
            assert torch.allclose(total, meant[fqn] - left, rtol=0, atol=1e-9 * scale), fqn
        if "mean_estimate" in plan.kinds:
            held = states[0].get(fqn, "mean_estimate", total)
            estimates = mean_of(states, fqn, "estimate", total)
            assert torch.allclose(held, estimates, rtol=0, atol=1e-9 * scale), fqn


@pytest.mark.parametrize("compressor", ["top-k", "int4", "sign"])
def test_econtrol_without_feedback_is_ef21(compressor: str) -> None:
    one, other = ef21(BIASED[compressor], eta=1), econtrol(BIASED[compressor], eta=0)
    ones, others = fresh_states(one, 2), fresh_states(other, 2)
    for step in range(5):
        values = per_rank(step, SIZES, 2)
        first, second = exchange(values, one, ones, step=step)[0], exchange(values, other, others, step=step)[0]
        assert all(torch.equal(first.values[fqn], second.values[fqn]) for fqn in first.values)
        for state in (*ones, *others):
            state.commit()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_around_the_identity_feedback_changes_nothing(feedback: str) -> None:
    plan = FEEDBACKS[feedback](cast("fp32"))
    values = per_rank(1, SIZES, 3)
    dense = exchange(values, as_plan(None))[0]
    found = exchange(values, plan)[0]
    assert all(torch.equal(found.values[fqn], dense.values[fqn]) for fqn in dense.values)


@pytest.mark.slow
@pytest.mark.parametrize("feedback", ["EF21", "EF21-SGDM", "EControl"])
@pytest.mark.parametrize("compressor", ["top-k", "int4", "sign", "compeft"])
def test_constant_values_of_unlike_workers_are_learned(compressor: str, feedback: str) -> None:
    """Where EF14 goes on oscillating, differences from an estimate die out."""
    plan = FEEDBACKS[feedback](BIASED[compressor])
    states = fresh_states(plan, 3)
    values = [{"layers.2.weight": mine["layers.2.weight"]} for mine in doubles(0, 3)]
    for step in range(150):
        found = exchange(values, plan, states, step=step)[0]
        for state in states:
            state.commit()
    wanted = torch.stack([mine["layers.2.weight"] for mine in values]).mean(0)
    assert float((found.values["layers.2.weight"] - wanted).norm()) < 0.02 * float(wanted.norm())


@pytest.mark.parametrize("make", [ef21, econtrol, error_feedback])
def test_feedback_needs_a_contraction_and_no_second_one(make: Callable[..., Compression]) -> None:
    with pytest.raises(ValueError, match="guarantees no contraction"):
        make(randk(0.1, scaled=True))
    with pytest.raises(ValueError, match="would feed every error back twice"):
        make(error_feedback(topk(0.1)))
    with pytest.raises(TypeError, match="give it a compressor"):
        make("int8")


def test_the_shares_of_feedback_lie_within_their_ranges() -> None:
    with pytest.raises(ValueError, match=r"eta is 0; the momentum's share of a new value lies in \(0, 1\]"):
        ef21(topk(0.1), eta=0)
    with pytest.raises(ValueError, match=r"eta is 2; the part of the residual that is fed back lies in \[0, 1\]"):
        econtrol(topk(0.1), eta=2)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("compressor", ["top-k", "int4", "PowerSGD"])
def test_consolidation_keeps_every_mean(compressor: str, feedback: str) -> None:
    plan, world = FEEDBACKS[feedback](BIASED[compressor]), 3
    states = fresh_states(plan, world)
    for step in range(3):
        exchange(doubles(step, world), plan, states, step=step)
        for state in states:
            state.commit()
    names = [name for name, kind in plan.kinds.items() if kind == "per_worker"]
    like = torch.zeros(64 * 48, dtype=torch.float64)
    before = {name: mean_of(states, "layers.0.weight", name, like) for name in names}
    simulate([consolidate(state, Place(r, world), Key(0, 3, r)) for r, state in enumerate(states)])
    for name in names:
        rows = [state.get("layers.0.weight", name, like) for state in states]
        assert all(torch.equal(row, rows[0]) for row in rows)
        assert torch.allclose(rows[0], before[name], rtol=1e-12, atol=1e-12)


def test_a_constant_loss_scale_and_one_that_changes_in_between_are_the_same() -> None:
    plan = error_feedback(topk(0.1))
    one, other = fresh_states(plan, 2), fresh_states(plan, 2)
    for step in range(4):
        scale = 1.0 if step < 2 else 0.25
        values = per_rank(step, SIZES, 2)
        scaled = [{fqn: scale * value for fqn, value in mine.items()} for mine in values]
        if step == 2:
            for state in other:
                state.scale(plan.kinds, 0.25)
        first, second = exchange(values, plan, one, step=step)[0], exchange(scaled, plan, other, step=step)[0]
        for state in (*one, *other):
            state.commit()
        assert all(torch.equal(scale * first.values[fqn], second.values[fqn]) for fqn in first.values)


# --- low rank -------------------------------------------------------------------------------------------------------


def test_a_matrix_of_low_rank_comes_back_exactly() -> None:
    left, right = draw(1, 40 * 2).view(40, 2), draw(2, 2 * 30).view(2, 30)
    values = [{"w": (left @ right).reshape(-1) * (rank + 1)} for rank in range(3)]
    lies = {"w": Matrix(1200, 30, 0)}
    plan = as_plan(powersgd(2))
    states = [State(plan.kinds) for _ in range(3)]  # type: ignore[attr-defined]
    flows = [
        collective.exchange(values[r], plan, rank_order_mean, Place(r, 3), Key(0, 0, r), states[r], matrices=lies)
        for r in range(3)
    ]
    for found in simulate(flows):
        assert torch.allclose(found.values["w"], 2 * values[0]["w"], rtol=1e-4, atol=1e-4)


class RandomBasis:
    """Another compressor in two rounds, which keeps nothing: no more than `TwoRoundCompressor` asks for."""

    rank = 2
    kinds: ClassVar[dict[str, Kind]] = {}

    def pays(self, matrix: Matrix) -> bool:
        return matrix.columns > 1

    def start(self, matrix: Matrix, key: Key, state: State, like: Tensor) -> Tensor:
        generator = replace(key.shared, phase="basis").generator(like.device)
        return torch.randn(matrix.columns, self.rank, generator=generator).to(like)

    def basis(self, mean: Tensor) -> Tensor:
        return orthonormal(mean)

    def keep(self, fqn: str, factor: Tensor, start: Tensor, state: State) -> None: ...


def test_a_compressor_in_two_rounds_is_whatever_has_its_protocol() -> None:
    values = [{"w": draw(r, 1200), "b": draw(r + 9, 40)} for r in range(3)]
    matrices = {"w": Matrix(1200, 30, 0), "b": Matrix(40, 1, 0)}
    plan = as_plan(error_feedback(RandomBasis()))
    states = fresh_states(plan, 3)
    flows = [
        collective.exchange(values[r], plan, rank_order_mean, Place(r, 3), Key(0, 0, r), states[r], matrices=matrices)
        for r in range(3)
    ]
    first, *others = (combined.values for combined in simulate(flows))
    residuals = torch.stack([state.staging["w"]["residual"] for state in states])
    mean = torch.stack([value["w"] for value in values]).mean(0)
    assert torch.linalg.matrix_rank(first["w"].view(40, 30)) == 2 and torch.equal(first["w"], others[0]["w"])
    assert torch.allclose(first["w"] + residuals.mean(0), mean, atol=1e-5)
    assert torch.allclose(first["b"], torch.stack([value["b"] for value in values]).mean(0))


def test_it_sends_what_its_factors_take_and_vectors_as_they_are() -> None:
    values = [{"w": draw(r, 1200), "b": draw(r + 9, 40)} for r in range(3)]
    lies = {"w": Matrix(1200, 30, 0), "b": Matrix(40, 1, 0)}
    plan = as_plan(error_feedback(powersgd(2)))
    meters = [Meter() for _ in range(3)]
    states = fresh_states(plan, 3)
    places = [{"replicate": Place(r, 3), "shard": Place(0, 1)} for r in range(3)]
    simulate(
        [
            metered(
                collective.exchange(
                    values[r], plan, rank_order_mean, Place(r, 3), Key(0, 0, r), states[r], matrices=lies
                ),
                meters[r],
                places[r],  # type: ignore[arg-type]
                "gradients",
            )
            for r in range(3)
        ]
    )
    fp32 = cast("fp32")
    parts = [two_phase_bytes(numels, fp32, 3) for numels in ([40 * 2], [40], [30 * 2])]
    assert [meter.sent_bytes for meter in meters] == [sum(parts)] * 3


def test_zeros_and_what_is_not_finite_do_not_poison_the_factors() -> None:
    plan = as_plan(error_feedback(powersgd(2)))
    states = fresh_states(plan, 2)
    good = [{"w": draw(r, 900)} for r in range(2)]
    zero = [{"w": torch.zeros(900)} for _ in range(2)]
    assert not exchange(zero, plan, states)[0].values["w"].any()
    for state in states:
        state.commit()
    assert exchange(good, plan, states, step=1)[0].values["w"].any()
    for state in states:
        state.commit()
    before = [{n: t.clone() for n, t in state.tensors["w"].items()} for state in states]
    bad = [{"w": draw(r, 900)} for r in range(2)]
    bad[1]["w"][5] = torch.inf
    assert [found.finite for found in exchange(bad, plan, states, step=2)] == [False, False]
    for state, kept in zip(states, before, strict=True):
        state.rollback()
        assert all(torch.equal(state.tensors["w"][name], kept[name]) for name in kept)
    assert exchange(good, plan, states, step=2)[0].finite


def test_the_basis_is_kept_when_the_rank_changes() -> None:
    state, like = State({"q": "opaque"}), torch.zeros(())
    lies, key = Matrix(900, 30, 0), Key(0, 7, 1, "w")
    first = LowRank(3, 2.0).start(lies, key, state, like)
    assert torch.equal(first, LowRank(3, 2.0).start(lies, Key(0, 9, 0, "w"), state, like))
    state.stage("w", "q", 5 * first)
    state.commit()
    assert torch.equal(LowRank(3, 2.0).start(lies, key, state, like), 5 * first)
    wider = LowRank(5, 2.0).start(lies, key, state, like)
    assert torch.equal(wider[:, :3], 5 * first) and bool(wider[:, 3:].any(0).all())
    assert torch.equal(LowRank(2, 2.0).start(lies, key, state, like), 5 * first[:, :2])


@pytest.mark.parametrize(("offset", "numel"), [(0, 12), (4, 8), (3, 5), (5, 7), (1, 1), (0, 0)])
def test_a_piece_lies_in_the_rows_of_its_parameter(offset: int, numel: int) -> None:
    whole = torch.arange(12.0).view(3, 2, 2)
    lies = matrices({"w": Segment("w", offset, numel)}, {"w": (3, 2, 2)})["w"]
    piece = whole.reshape(-1)[offset : offset + numel]
    matrix = lies.view(piece)
    assert matrix.shape == (lies.rows, 4) and torch.equal(lies.flat(matrix), piece)
    shown = torch.zeros(12)
    shown[offset : offset + numel] = piece
    start = offset // 4
    assert torch.equal(matrix, shown.view(3, 4)[start : start + lies.rows])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_basis_is_orthonormal_at_any_scale(scale: float) -> None:
    basis = orthonormal(draw(3, 60).view(20, 3) * scale)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)


def test_low_rank_combines_by_a_mean_only() -> None:
    from dtrain import diloco, every_step

    with pytest.raises(ValueError, match="of which only a mean makes sense"):
        every_step(compress=powersgd(2), combine=lambda rows: rows.median(0).values)
    assert diloco(compress=error_feedback(powersgd(2))).kinds["q"] == "opaque"


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"rank": 1.5}, {"rank": 4, "min_rate": 0.5}])
def test_bad_ranks_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"is (0|1\.5|0\.5); "):
        powersgd(**arguments)  # type: ignore[arg-type]


# --- plans ----------------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_counts() -> None:
    plan = by_layer({"*.norm.*": None, "layers.0.*": topk(0.1), "layers.*": sign()}, default=powersgd(2))
    chosen = {fqn: plan.of(fqn, 0).compressor for fqn in ("layers.0.norm.weight", "layers.0.w", "layers.1.w", "head")}
    assert list(chosen.values()) == [cast("fp32"), topk(0.1), sign(), powersgd(2)]


def test_another_compression_from_a_step_on() -> None:
    plan = after(3, error_feedback(topk(0.1)), before=error_feedback(quantize(bits=8)))
    assert [type(plan.of("w", step).compressor).__name__ for step in (0, 2, 3)] == ["Quantize", "Quantize", "TopK"]
    for step in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="give the number of the first step, at least 1"):
            after(step, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("learns", [lgreco(topk(0.1)), accordion(topk(0.1), topk(0.01))])
def test_a_plan_that_learns_is_not_put_where_it_could_not(learns: Plan) -> None:
    for make in (lambda: by_layer({"a": learns}), lambda: after(3, learns), lambda: onebit_adam(3, compress=learns)):
        with pytest.raises(ValueError, match="learns from what it compresses"):
            make()


def test_a_plan_of_many_compressors_is_each_of_them_alone() -> None:
    """One message, but every parameter as if it were the only one."""
    plan = by_layer(
        {"layers.0.*": error_feedback(powersgd(2)), "layers.1.*": sign(block=16), "layers.2.*": ef21(topk(0.1))}
    )
    values = per_rank(3, SIZES, 3)
    whole = exchange(values, plan, fresh_states(plan, 3))[0].values
    for fqn in whole:
        alone: Plan = plan.of(fqn, 0)
        found = exchange([{fqn: mine[fqn]} for mine in values], alone)[0].values
        assert torch.equal(found[fqn], whole[fqn]), fqn


# --- together -------------------------------------------------------------------------------------------------------


def waves(rank: int, count: int) -> Flow[list[float]]:
    seen = []
    for number in range(count):
        (rows,) = yield AllGather((torch.tensor([10.0 * number + rank]),))
        seen.append(float(rows.sum()))
    return seen


def test_flows_of_other_lengths_go_together_in_as_many_messages_as_the_longest() -> None:
    meters = [Meter() for _ in range(2)]
    places = [{"replicate": Place(r, 2), "shard": Place(0, 1)} for r in range(2)]
    flows = [
        metered(together([waves(r, 3), waves(r, 1), waves(r, 0)]), meters[r], places[r], "x")  # type: ignore[arg-type]
        for r in range(2)
    ]
    assert simulate(flows) == [[[1.0, 21.0, 41.0], [1.0], []]] * 2
    assert meters[0].sent_bytes == 4 * 4


def test_ops_of_another_kind_wait_until_the_first_flow_yields_theirs_or_has_ended() -> None:
    sent: list[tuple[str, int]] = []

    def summed_then_gathered(rank: int) -> Flow[list[float]]:
        (total,) = yield AllReduce((torch.full((1,), float(rank)),))
        (rows,) = yield AllGather((torch.full((1,), float(rank)),))
        return [float(total), *rows.flatten().tolist()]

    def watched(flow: Flow[list[list[float]]]) -> Flow[list[list[float]]]:
        op = next(flow)
        try:
            while True:
                sent.append((type(op).__name__, len(op.payload)))
                op = flow.send((yield op))
        except StopIteration as done:
            return cast_("list[list[float]]", done.value)

    flows = [together([summed_then_gathered(r), waves(r, 2), summed_then_gathered(r)]) for r in range(2)]
    found = simulate([watched(flows[0]), flows[1]])
    assert found == [[[1.0, 0.0, 1.0], [1.0, 21.0], [1.0, 0.0, 1.0]]] * 2
    assert sent == [("AllReduce", 2), ("AllGather", 3), ("AllGather", 1)]


def test_square_pieces_are_matrices_whose_first_row_is_cut() -> None:
    assert square({"w": torch.zeros(9)}) == {"w": Matrix(9, 3, 1)}
