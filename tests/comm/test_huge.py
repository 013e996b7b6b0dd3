"""Huge finite values: nothing that is kept becomes useless by one, on any rank, and the next steps are made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtrain import dgc, diloco, eager_diloco, local_sgd, slowmo
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.compressors.projection import projection
from dtrain.comm.feedback import EF14, Compression, NoFeedback, econtrol
from dtrain.comm.methods.fedhyper import fedhyper
from dtrain.comm.methods.local_update import local_update
from dtrain.comm.ops import Place
from dtrain.comm.outer_optimizers import adam, nesterov
from dtrain.comm.runtime.method import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import cast, compeft, ef21, error_feedback, powersgd, quantize, randk, sign, topk
from dtrain.plans import ef21w
from dtrain.testing.replicas import Replicas, quadratic
from tests.comm.zoo import bits, fresh_states, named, square

SIZES = (32 * 32, 40)
PLANS: dict[str, Compression] = {
    "int8": error_feedback(quantize(bits=8)),
    "sign": error_feedback(sign()),
    "top-k": error_feedback(topk(0.02)),
    "random-k": error_feedback(randk(0.1)),
    "compeft": error_feedback(compeft()),
    "compeft, alpha": Compression(compeft(alpha=1.0), EF14()),
    "powersgd": error_feedback(powersgd(4)),
    "powersgd, no feedback": Compression(powersgd(4), NoFeedback()),
    "projection": error_feedback(projection(8, block=64)),
    "fp8": error_feedback(cast("fp8_e4m3")),
    "ef21": ef21(topk(0.05)),
    "ef21, compeft": ef21(compeft(), eta=1),
    "ef21, powersgd": ef21(powersgd(2)),
    "econtrol": econtrol(compeft()),
    "econtrol, powersgd": econtrol(powersgd(2)),
    "dgc": dgc(0.05).exchange.plan.compressions[0],
    "ef21w": ef21w(topk(0.05)).learning,
}
HUGE = (1e18, 1e19, 3e38)


def exchanged(values: list[dict[str, Tensor]], plan: Compression, states: list[State], step: int, route: str) -> bool:
    """One step; whether it was made."""
    lies, world = square(values[0]), len(values)
    flows = [
        exchange(
            values[r], plan, rank_order_mean, Place(r, world), Key(1, step, r), states[r], matrices=lies,
            route=route,  # type: ignore[arg-type]
        )
        for r in range(world)
    ]  # fmt: skip
    results = simulate(flows)
    assert len({each.finite for each in results}) == 1
    for state in states:
        state.commit() if results[0].finite else state.rollback()
    return results[0].finite


def require_sound(states: list[State]) -> None:
    for fqn, kept in states[0].tensors.items():
        for name in kept:
            tensors = [state.tensors[fqn][name] for state in states]
            assert all(bool(tensor.isfinite().all()) for tensor in tensors), (fqn, name)
            if states[0].kinds[name] in ("replicated", "opaque"):
                assert all(torch.equal(bits(tensors[0]), bits(tensor)) for tensor in tensors), (fqn, name)


SUMMED = ("random-k", "projection", "powersgd", "ef21, powersgd")
CASES = [
    *((name, 2, "two_phase") for name in PLANS),
    *((name, 4, "two_phase") for name in ("compeft", "sign", "econtrol")),
    *((name, 2, "all_reduce") for name in SUMMED),
    *((name, 3, "all_gather") for name in PLANS),
    *((name, 4, "sparse_all_reduce") for name in ("top-k", "ef21", "dgc")),
]


@pytest.mark.parametrize(("name", "world", "route"), CASES)
def test_steps_go_on_after_a_huge_finite_gradient(name: str, world: int, route: str) -> None:
    plan = PLANS[name]
    for size in HUGE:
        for everywhere in (False, True):
            states = fresh_states(plan, world)
            for step in range(6):
                values = [named(9 + step * 10 + rank, SIZES) for rank in range(world)]
                if step == 2:
                    hit = values[1]["layers.0.weight"]
                    hit.mul_(size) if everywhere else hit[70:71].fill_(-size)
                made = exchanged(values, plan, states, step, route)
                require_sound(states)
                assert made or step == 2, (size, everywhere, step)


METHODS: dict[str, Sync] = {
    "diloco, feedback": diloco(every_steps=2, compress=error_feedback(compeft())),
    "diloco, powersgd": diloco(every_steps=2, compress=error_feedback(powersgd(1, min_rate=1.0))),
    "diloco, ef21": diloco(every_steps=2, compress=ef21(quantize(bits=8), eta=1)),
    "adam": diloco(every_steps=2, outer=adam(lr=0.1)),
    "fedhyper": local_update(every_steps=2, outer=fedhyper()),
    "slowmo": slowmo(every_steps=2),
    "sharded": local_update(every_steps=2, outer=nesterov(), outer_state="sharded"),
    "eager": eager_diloco(every_steps=2),
    "local_sgd": local_sgd(every_steps=2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1e19, 3e38, float("nan")])
def test_rounds_go_on_after_a_replica_has_gone_far_astray(name: str, size: float) -> None:
    def gradient(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
        return quadratic(rank, step, fqn, x)

    replicas = Replicas(METHODS[name], 3, gradient=gradient, start={"w": torch.zeros(64)})
    replicas.train(4)
    replicas.pieces[1].values["w"][5] = size
    replicas.train(2)
    before = [attached.method.rounds for attached in replicas.attached]
    replicas.train(30)
    for rank, attached in enumerate(replicas.attached):
        assert attached.method.rounds > before[rank]
        for tensors in attached.state.tensors.values():
            assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        assert float(replicas.live(rank)["w"].abs().max()) < 100
    scalars = [one.scalar for attached in replicas.attached for one in attached.method.cadence.fragments]  # type: ignore[attr-defined]
    assert all(-1 <= scalar <= 5 for scalar in scalars)


def test_a_state_that_is_not_finite_is_not_loaded() -> None:
    with pytest.raises(ValueError, match="'residual' of w in the state to load is not finite"):
        State({"residual": "per_worker"}).load({"w": {"residual": torch.tensor([1.0, torch.inf])}})
