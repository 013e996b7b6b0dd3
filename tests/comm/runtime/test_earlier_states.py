"""States that were saved before: the sync of today loads them and goes on as the one that wrote them did.

``states_of_a31f9c2.pt`` was written at revision a31f9c2, which kept floats as the integers of their bits and called
methods by their classes: for each of `SPECS`, what two ranks saved after 7 steps, the parameters that they had then,
and those after 6 steps more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dtrain import (
    co2,
    delayed_diloco,
    dgc,
    diloco,
    eager_diloco,
    every_step,
    fedavg_m,
    fedkseed,
    ferret,
    post_local_sgd,
    scaffold_m,
    slowmo,
    sparta,
    streaming_diloco,
)
from dtrain.comm.runtime.method import Sync
from dtrain.compress import econtrol, ef21, error_feedback, powersgd, quantize, topk
from dtrain.outer import adam, fedhyper
from dtrain.plans import accordion, ef21w, lgreco
from dtrain.testing.replicas import Replicas, equal
from tests.comm.methods.test_fedkseed import Trying

OLD: Any = {"route": "two_phase"}  # the only route of what is sparse in those days
SPARSE: dict[str, Callable[..., Sync]] = {
    "feedback": lambda **route: every_step(compress=error_feedback(topk(0.3)), **route),
    "ef21": lambda **route: every_step(compress=ef21(topk(0.3)), **route),
    "econtrol": lambda **route: every_step(compress=econtrol(topk(0.3)), **route),
    "accordion": lambda **route: every_step(
        compress=accordion(error_feedback(topk(0.5)), error_feedback(topk(0.1)), every=2, accumulate=1), **route
    ),
    "ef21w": lambda **route: every_step(compress=ef21w(topk(0.3), warmup_steps=3), **route),
    "dgc": lambda **route: dgc(0.1, **route),
    "diloco": lambda **route: diloco(every_steps=4, compress=error_feedback(topk(0.3)), **route),
}
SPECS: dict[str, Sync] = {
    **{name: make(**OLD) for name, make in SPARSE.items()},
    "low rank": every_step(compress=error_feedback(powersgd(2))),
    "lgreco": every_step(compress=lgreco(error_feedback(quantize(bits=4, block=16)), every=3)),
    "diloco, adam": diloco(every_steps=3, outer=adam(lr=0.1)),
    "fedhyper": diloco(every_steps=3, outer=fedhyper(kappa=0.3)),
    "sharded": diloco(every_steps=4, outer_state="sharded"),
    "offloaded": diloco(every_steps=4, outer_state="offloaded"),
    "streaming": streaming_diloco(
        every_steps=6, layers_per_fragment=1, overlap_steps=3, compress=error_feedback(quantize(bits=4, block=16))
    ),
    "delayed": delayed_diloco(every_steps=3),
    "eager": eager_diloco(every_steps=3),
    "co2": co2(every_steps=3),
    "slowmo": slowmo(every_steps=3),
    "warm-up": post_local_sgd(every_steps=3, warmup_steps=5),
    "sparta": sparta(density=0.1),
    "fedavg_m": fedavg_m(every_steps=4),
    "scaffold_m": scaffold_m(every_steps=4),
    "ferret": ferret(every_steps=4, directions=20),
    "fedkseed": fedkseed(every_steps=4, directions=50),
}
STATES = Path(__file__).parent / "states_of_a31f9c2.pt"


@pytest.fixture(scope="module")
def earlier() -> dict[str, Any]:
    return cast("dict[str, Any]", torch.load(STATES, weights_only=True))


@pytest.mark.parametrize("name", SPECS)
def test_it_goes_on_as_the_sync_that_wrote_it_did(name: str, earlier: dict[str, Any]) -> None:
    kept = earlier[name]
    replicas = (Trying if name == "fedkseed" else Replicas)(SPECS[name], 2)
    for pieces, parameters in zip(replicas.pieces, kept["parameters"], strict=True):
        pieces.write(parameters)
    replicas.all(lambda rank: replicas.attached[rank].load_state_dict(kept["states"][rank]))
    assert [attached.steps for attached in replicas.attached] == [7, 7]
    replicas.train(6)
    for rank in range(2):
        # To the bit on the processor that wrote them; others may round products of matrices elsewhere.
        torch.testing.assert_close(replicas.live(rank), kept["end"][rank], rtol=1e-5, atol=1e-6)
    replicas.close()


def test_accordion_goes_on_by_sums_where_it_compared_single_gradients(earlier: dict[str, Any]) -> None:
    kept = earlier["accordion"]
    plan = accordion(error_feedback(topk(0.5)), error_feedback(topk(0.1)), every=2)
    replicas = Replicas(every_step(compress=plan), 2)
    for pieces, parameters in zip(replicas.pieces, kept["parameters"], strict=True):
        pieces.write(parameters)
    replicas.all(lambda rank: replicas.attached[rank].load_state_dict(kept["states"][rank]))
    replicas.train(6)
    numbers = replicas.attached[0].plan.numbers()
    assert (numbers["plan.exchanges"], numbers["plan.rate"]) == (13, 0.05)


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_one_goes_on_by_the_route_of_today(name: str, earlier: dict[str, Any]) -> None:
    kept = earlier[name]
    replicas = Replicas(SPARSE[name](), 2)
    for pieces, parameters in zip(replicas.pieces, kept["parameters"], strict=True):
        pieces.write(parameters)
    replicas.all(lambda rank: replicas.attached[rank].load_state_dict(kept["states"][rank]))
    replicas.train(5)
    assert [attached.steps for attached in replicas.attached] == [12, 12]
    assert equal(replicas.live(0), replicas.live(1))  # the step after a round of diloco is the twelfth
    replicas.close()


def test_all_of_them_are_tried(earlier: dict[str, Any]) -> None:
    assert set(earlier) == set(SPECS)
    assert all(
        "integers" in entries for kept in earlier.values() for state in kept["states"] for entries in state.values()
    )
