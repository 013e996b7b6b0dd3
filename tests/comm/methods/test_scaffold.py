"""FedAvg-M and SCAFFOLD-M against the algorithms as they are written, and what they are for: data that differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtrain import fedavg_m, local_sgd, scaffold_m
from dtrain.comm.layout import Named
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.plans.plan import Compress
from dtrain.comm.runtime.method import Sync
from dtrain.compress import ef21, error_feedback, quantize, topk
from dtrain.plans import by_layer
from dtrain.testing.replicas import Replicas, equal, quadratic
from tests.comm.zoo import draw

WORLD, EVERY, LR = 3, 4, 0.05


def as_written(start: Named, rounds: int, beta: float, outer: float, control: bool) -> dict[str, Tensor]:
    """Clients that keep the mean of their gradients, and a server that is sent deltas and variates."""
    x = {fqn: value.double() for fqn, value in start.items()}
    zeros = {fqn: torch.zeros_like(value) for fqn, value in x.items()}
    g, c = dict(zeros), dict(zeros)
    own = [dict(zeros) for _ in range(WORLD)]
    for number in range(rounds):
        deltas, fresh = [], []
        for rank in range(WORLD):
            y, total = dict(x), dict(zeros)
            for step in range(number * EVERY, (number + 1) * EVERY):
                for fqn, value in y.items():
                    gradient = quadratic(rank, step, fqn, value.float()).double()
                    total[fqn] = total[fqn] + gradient
                    corrected = gradient - own[rank][fqn] + c[fqn]
                    y[fqn] = value - LR * (beta * corrected + (1 - beta) * g[fqn])
            deltas.append({fqn: x[fqn] - y[fqn] for fqn in x})
            fresh.append({fqn: total[fqn] / EVERY for fqn in x})
        g = {fqn: sum(delta[fqn] for delta in deltas) / (LR * WORLD * EVERY) for fqn in x}  # type: ignore[misc]
        if control:
            c = {fqn: sum(each[fqn] for each in fresh) / WORLD for fqn in x}  # type: ignore[misc]
            own = fresh
        x = {fqn: x[fqn] - outer * LR * EVERY * g[fqn] for fqn in x}
    return x


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("control", [False, True])
def test_it_is_the_algorithm_as_it_is_written(beta: float, control: bool) -> None:
    made = scaffold_m if control else fedavg_m
    replicas = Replicas(made(every_steps=EVERY, beta=beta, lr=0.9), WORLD, lr=LR)
    replicas.train(5 * EVERY)
    for fqn, expected in as_written(replicas.start, 5, beta, 0.9, control).items():
        torch.testing.assert_close(replicas.anchor[fqn].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_variate_of_all_is_the_mean_of_each_ones() -> None:
    replicas = Replicas(scaffold_m(every_steps=EVERY, beta=0.5), WORLD)
    replicas.train(3 * EVERY)
    for fqn, control in replicas.kept(0, "control").items():
        own = torch.stack([replicas.kept(rank, "own_control")[fqn] for rank in range(WORLD)])
        torch.testing.assert_close(own.mean(0), control, rtol=1e-4, atol=1e-5)


def test_without_mixing_fedavg_m_is_local_sgd_to_the_bit() -> None:
    one, other = (Replicas(spec, WORLD) for spec in (fedavg_m(every_steps=3, beta=1.0), local_sgd(every_steps=3)))
    for _ in range(3):
        one.train(3)
        other.train(3)
        assert all(equal(one.live(rank), other.live(rank)) for rank in range(WORLD))


def bowls(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
    """Without noise, of other curvature and centre for each rank."""
    return (1 + 2 * rank) * (x - draw(rank, x.numel()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "compress", [None, error_feedback(quantize(bits=8, block=16))], ids=["fp32", "8 bits with feedback"]
)
def test_where_data_differ_it_comes_to_the_optimum_and_local_sgd_beside_it(compress: object) -> None:
    far = {}
    specs: dict[str, Sync] = {
        "scaffold": scaffold_m(every_steps=10, compress=compress),  # type: ignore[arg-type]
        "local": local_sgd(every_steps=10),
    }
    for name, spec in specs.items():
        replicas = Replicas(spec, WORLD, gradient=bowls, lr=0.05)
        replicas.train(400)
        curvature = [1 + 2 * rank for rank in range(WORLD)]
        far[name] = max(
            float((x - sum(a * draw(rank, x.numel()) for rank, a in enumerate(curvature)) / sum(curvature)).abs().max())
            for x in replicas.anchor.values()
        )
    assert far["scaffold"] < 1e-3 < 0.05 < far["local"]


@pytest.mark.parametrize("spec", [fedavg_m(every_steps=4, beta=0.3), scaffold_m(every_steps=4, beta=0.5)])
@pytest.mark.parametrize("steps", [4, 6])
def test_going_on_is_never_having_stopped(spec: LocalUpdate, steps: int) -> None:
    whole = Replicas(spec, WORLD)
    whole.train(steps)
    again = whole.resumed()
    whole.train(7)
    again.train(7)
    assert all(equal(whole.live(rank), again.live(rank)) for rank in range(WORLD))


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 0.0), (0.0, 0.1)])
def test_another_inner_optimizer_is_refused(momentum: float, weight_decay: float) -> None:
    replicas = Replicas(local_sgd(every_steps=4), 1)
    pieces = replicas.pieces[0]
    pieces.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    with pytest.raises(ValueError, match="plain SGD"):
        scaffold_m().bind(pieces, 0)


@pytest.mark.parametrize("beta", [0.0, 1.1])
def test_what_a_gradient_counts_lies_between_zero_and_one(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        fedavg_m(beta=beta)


LOSSY: dict[str, Compress] = {
    "4 bits": quantize(bits=4, block=64),
    "4 bits, stochastic": quantize(bits=4, block=64, rounding="stochastic"),
    "top-k": topk(0.1),
    "by layer": by_layer({"w": topk(0.1)}),
    "top-k, fed back": error_feedback(topk(0.1)),
    "8 bits, EF21": ef21(quantize(bits=8, block=64), eta=1),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without feedback")
@pytest.mark.parametrize("name", LOSSY)
def test_what_a_round_loses_does_not_add_up_in_the_variates(name: str) -> None:
    """With noise, round by round, to within what noise leaves; fp32 ends 0.14 off, as the noise has it."""
    numel = 200

    def noisy(rank: int, step: int, fqn: str, x: Tensor) -> Tensor:
        return (1 + 0.3 * rank) * (x - draw(rank, numel)) + draw(7919 * rank + step + 11, numel)

    replicas = Replicas(
        scaffold_m(every_steps=5, compress=LOSSY[name]), WORLD, gradient=noisy, start={"w": torch.zeros(numel)}
    )
    replicas.train(500)
    curvature = [1 + 0.3 * rank for rank in range(WORLD)]
    optimum = sum(a * draw(rank, numel) for rank, a in enumerate(curvature)) / sum(curvature)
    assert float((replicas.anchor["w"] - optimum).norm() / torch.as_tensor(optimum).norm()) < 0.2
    if name != "top-k, fed back":  # there the variates differ by the mean residual, which is bounded
        mean = torch.stack([replicas.kept(rank, "own_control")["w"] for rank in range(WORLD)]).mean(0)
        torch.testing.assert_close(mean, replicas.kept(0, "control")["w"], rtol=1e-3, atol=1e-3)


def test_an_estimate_that_lags_is_refused() -> None:
    with pytest.raises(ValueError, match="scaffold_m diverges where a running estimate"):
        scaffold_m(compress=by_layer({"head.*": ef21(topk(0.1))}))
