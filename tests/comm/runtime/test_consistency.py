"""Replicas that differ are found under every sync: the majority is right, and where there is none nobody guesses."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dtrain
from dtrain import (
    diloco,
    every_step,
    fedavg_m,
    fedkseed,
    local_sgd,
    local_update,
    onebit_adam,
    post_local_sgd,
    scaffold_m,
    slowmo,
    sparta,
    streaming_diloco,
)
from dtrain.comm.ops import Place
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import ReplicasDiffer, Tie, compared, fingerprint, kept_by, plain
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import ef21, error_feedback, quantize, topk
from dtrain.outer import adam, nesterov, sgd
from dtrain.testing.replicas import Replica, Replicas, equal

EF = error_feedback(quantize(bits=8, block=16))
EVERY_STEP: dict[str, Callable[..., Sync]] = {
    "dense": every_step,
    "int8_ef": lambda **more: every_step(compress=EF, **more),
    "ef21": lambda **more: every_step(compress=ef21(topk(0.3), eta=1.0), **more),
}
ROUNDS: dict[str, Callable[..., Sync]] = {
    "local_sgd": lambda **more: local_sgd(every_steps=2, **more),
    "diloco": lambda **more: diloco(every_steps=2, **more),
    "sharded": lambda **more: diloco(every_steps=2, outer_state="sharded", **more),
    "offloaded": lambda **more: diloco(every_steps=2, outer_state="offloaded", **more),
    "slowmo": lambda **more: slowmo(every_steps=2, **more),
    "outer adam": lambda **more: local_update(every_steps=2, outer=adam(lr=0.01), **more),
    "fedavg_m": lambda **more: fedavg_m(every_steps=2, **more),
    "scaffold_m": lambda **more: scaffold_m(every_steps=2, **more),
    "streaming": lambda **more: streaming_diloco(every_steps=4, layers_per_fragment=0, overlap_steps=1, **more),
}


class Stepped(Replica):
    """With Adam's state for what it holds, so that there is an optimizer state to compare."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.leaves = {fqn: torch.nn.Parameter(value) for fqn, value in self.values.items()}
        self.optimizer = torch.optim.Adam(list(self.leaves.values()), lr=lr)

    def step(self) -> None:
        for fqn, gradient in self.gradients.items():
            self.leaves[fqn].grad = gradient.clone()
        self.optimizer.step()
        self.skip()


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.testing.replicas.Replica", Stepped)


def flip(tensor: Tensor, element: int = -1, bit: int = 20) -> None:
    """One bit of one element, as a fault of memory would."""
    tensor.view(torch.int32).reshape(-1)[element] ^= 1 << bit


def alike(replicas: Replicas, ranks: range) -> bool:
    """Parameters, optimizer state and what is declared replicated, to the bit."""
    kinds = replicas.attached[0].state.kinds.items()
    for rank in ranks:
        one, other = replicas.pieces[0].optimizer, replicas.pieces[rank].optimizer
        if not equal(dict(kept_by(one)), dict(kept_by(other))):
            return False
        if not all(equal(replicas.kept(0, n), replicas.kept(rank, n)) for n, kind in kinds if kind == "replicated"):
            return False
    return True


def meet(replicas: Replicas, steps: int) -> list[str]:
    """Train, and what each rank raises; all must come back, as all of them hear of it."""

    def run(rank: int) -> str:
        try:
            replicas._train(rank, steps)
        except ReplicasDiffer as error:
            return str(error)
        return ""

    return replicas.all(run)


@pytest.mark.usefixtures("stepped")
@pytest.mark.parametrize("what", ["parameter", "exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("method", EVERY_STEP)
@pytest.mark.parametrize("wrong", [0, 2])
def test_of_three_the_wrong_one_is_named_and_repaired(method: str, what: str, wrong: int) -> None:
    replicas = Replicas(EVERY_STEP[method](verify_every=4), 3)
    replicas.train(6)
    pieces = cast(Stepped, replicas.pieces[wrong])
    if what == "parameter":
        flip(pieces.values["layers.2.weight"])
    else:
        flip(pieces.optimizer.state[pieces.leaves["layers.2.weight"]][what])
    with pytest.warns(RuntimeWarning, match="step 8: what must be equal on all replicas") as told:
        replicas.train(2)
    assert f"differed on replicas [{wrong}] and was replaced" in str(told[0].message)
    assert alike(replicas, range(1, 3)) and equal(replicas.live(0), replicas.live(wrong))
    assert [attached.repairs for attached in replicas.attached] == [1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replicas.train(8)


@pytest.mark.usefixtures("stepped")
@pytest.mark.parametrize("method", EVERY_STEP)
@pytest.mark.parametrize("wrong", [0, 1])
def test_of_two_nobody_knows_and_both_stop(method: str, wrong: int) -> None:
    replicas = Replicas(EVERY_STEP[method](verify_every=4), 2)
    replicas.train(3)
    flip(replicas.pieces[wrong].values["layers.1.weight"])
    told = meet(replicas, 1)
    assert all("step 4: replicas [0] and [1] differ in what must be equal" in message for message in told)
    assert all("go back to the last checkpoint" in message and "layers.1.weight" in message for message in told)


@pytest.mark.parametrize("method", EVERY_STEP)
def test_whose_is_taken_may_be_said(method: str) -> None:
    replicas = Replicas(EVERY_STEP[method](verify_every=4, tie="first"), 2)
    replicas.train(3)
    flip(replicas.pieces[1].values["layers.2.weight"])
    with pytest.warns(RuntimeWarning, match=re.escape("differed on replicas [1]")):
        replicas.train(1)
    assert equal(replicas.live(0), replicas.live(1))


@pytest.mark.parametrize("method", ROUNDS)
def test_rounds_are_compared_too(method: str) -> None:
    """Without a mishap nothing is found; one in what all share is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replicas = Replicas(ROUNDS[method](verify_every=1), 3)
        replicas.train(9)
    assert replicas.attached[0].repairs == 0
    shared = [name for name, kind in replicas.attached[2].state.kinds.items() if kind == "replicated"]
    for name in shared if method != "sharded" else []:
        kept = replicas.attached[2].state.tensors["layers.2.weight"]
        if name not in kept:
            continue
        flip(kept[name])
        with pytest.warns(RuntimeWarning, match=re.escape("differed on replicas [2]")):
            replicas.all(lambda rank: replicas.attached[rank].verify())
        assert equal(replicas.kept(0, name), replicas.kept(2, name))


def test_a_round_of_two_whose_anchors_differ_stops() -> None:
    replicas = Replicas(local_update(every_steps=2, outer=nesterov(), verify_every=2), 2)
    replicas.train(3)
    flip(replicas.attached[0].state.tensors["layers.1.weight"]["anchor"])
    assert all("replicas [0] and [1] differ" in message and "anchor" in message for message in meet(replicas, 1))


def test_in_a_warm_up_parameters_are_compared() -> None:
    for steps, at in ((2, 4), (5, 6)):  # after verify_every rounds' steps, and at its end
        replicas = Replicas(post_local_sgd(every_steps=2, warmup_steps=6, verify_every=2), 3)
        replicas.train(steps)
        flip(replicas.pieces[1].values["layers.2.weight"])
        with pytest.warns(RuntimeWarning, match=re.escape(f"step {at}:")):
            replicas.train(at - steps)
        assert equal(replicas.live(0), replicas.live(1)) and equal(replicas.live(0), replicas.live(2))


def test_right_after_a_round_of_sharded_state_all_hold_the_anchor() -> None:
    replicas = Replicas(diloco(every_steps=2, outer_state="sharded"), 3)
    replicas.train(4)
    flip(replicas.pieces[2].values["layers.2.weight"])
    with pytest.warns(RuntimeWarning, match=re.escape("differed on replicas [2]")):
        replicas.all(lambda rank: replicas.attached[rank].verify())
    assert equal(replicas.live(0), replicas.live(2))
    replicas.train(1)  # within a round each goes its own way
    assert replicas.all(lambda rank: replicas.attached[rank].verify()) == [True] * 3


def test_coordinates_that_were_averaged_are_compared() -> None:
    replicas = Replicas(sparta(density=0.5, verify_every=3), 3)
    replicas.train(2)
    write = replicas.pieces[1].write

    def broken(values: Any, fqns: Any = None) -> None:
        write(values, fqns)
        flip(replicas.pieces[1].values["layers.2.weight"], element=slice(None))  # type: ignore[arg-type]
        replicas.pieces[1].write = write  # type: ignore[method-assign]

    replicas.pieces[1].write = broken  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match=re.escape("coordinates that were just averaged) differed on replicas [1]")):
        replicas.train(1)
    replicas.train(4)
    assert replicas.attached[0].repairs == 1


@pytest.mark.usefixtures("stepped")
def test_what_does_not_even_have_the_same_shape_is_not_repaired() -> None:
    replicas = Replicas(every_step(verify_every=2), 3)
    replicas.train(1)
    optimizer = replicas.pieces[2].optimizer
    optimizer.state[next(iter(optimizer.state))]["count"] = 1
    assert all("[2] do not hold the same tensors" in message for message in meet(replicas, 1))


def test_only_some_who_were_asked_for_their_state_are_found_out() -> None:
    for spec, matters in ((every_step(compress=EF, verify_every=4), True), (every_step(verify_every=4), False)):
        replicas = Replicas(spec, 2)
        replicas.train(2)
        list(replicas.attached[0].state_dict())  # "if rank == 0: torch.save(sync.state_dict(), ...)"
        told = meet(replicas, 2)
        assert all(("were not asked equally often" in message) == matters for message in told)


def test_a_check_costs_sixteen_bytes() -> None:
    for spec in (every_step(verify_every=2), local_sgd(every_steps=1, verify_every=2), sparta(verify_every=2)):
        replicas = Replicas(spec, 3)
        replicas.train(6)
        assert replicas.pieces[1].channel.meter.sent_as("guard") == 3 * 2 * 16
    never = Replicas(every_step(verify_every=0), 3)
    never.train(2)
    assert never.pieces[1].channel.meter.sent_as("guard") == 0


OTHERS = {"GradScaler", "Members", "Trainer", "__version__", "attach", "load", "simulate"}
SYNCS = sorted({*dtrain.__all__} - OTHERS)


@pytest.mark.parametrize("name", SYNCS)
def test_every_sync_says_how_often_it_looks(name: str) -> None:
    make = getattr(dtrain, name)
    assert inspect.signature(make).parameters["verify_every"].default > 0
    all_needed: dict[str, dict[str, Any]] = {
        "local_sgd": {"every_steps": 4}, "post_local_sgd": {"every_steps": 4, "warmup_steps": 2},
        "local_update": {"every_steps": 4, "outer": sgd()}, "onebit_adam": {"warmup_steps": 2},
    }  # fmt: skip
    needed = all_needed.get(name, {})
    with pytest.raises(ValueError, match=re.escape("verify_every is -1; give a whole number of")):
        make(verify_every=-1, **needed)
    if name != "one_byte":
        with pytest.raises(ValueError, match=re.escape("tie is 'last'; choose 'stop', or 'first'")):
            make(tie="last", **needed)


# ---- the comparison itself -------------------------------------------------------------------------------------------


def held(values: list[Tensor]) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    return lambda: ((f"tensor {number}", value) for number, value in enumerate(values))


@given(
    size=st.sampled_from([1, 3, 1023, 1024, 1025, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.complex64]),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_any_bit_changes_a_fingerprint(size: int, dtype: torch.dtype, offset: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(0, 2, (size + offset,), generator=generator).to(dtype)
    one = whole[offset:]
    other = one.clone()
    assert fingerprint(one) == fingerprint(other)
    raw = other.view(torch.uint8)
    place = int(torch.randint(0, raw.numel(), (1,), generator=generator))
    raw[place] ^= 1 if dtype == torch.bool else 1 << int(torch.randint(0, 8, (1,), generator=generator))
    assert fingerprint(one) != fingerprint(other)
    if size > 1:
        assert fingerprint(torch.arange(size)) != fingerprint(torch.arange(size).flip(0))


@pytest.mark.parametrize(
    ("values", "tie", "problem", "wrong"),
    [
        ([1, 1, 1], "stop", "", []),
        ([1, 2, 1], "stop", "", [1]),
        ([2, 1, 1, 3], "stop", "", [0, 3]),
        ([1, 2], "stop", "tie", [1]),
        ([1, 1, 2, 2], "stop", "tie", [2, 3]),
        ([1, 2, 3], "stop", "tie", [1, 2]),
        ([2, 2, 1, 1], "first", "", [2, 3]),
        ([3, 2, 2], "first", "", [0]),
    ],
)
def test_the_largest_group_is_right(values: list[int], tie: Tie, problem: str, wrong: list[int]) -> None:
    world = len(values)
    mine = [[torch.zeros(3), torch.full((2, 2), float(value))] for value in values]
    flows = [compared(held(own), "", 0, Place(rank, world), tie) for rank, own in enumerate(mine)]
    found = simulate(flows)
    assert all(verdict.problem == problem for verdict in found)
    assert sorted(rank for group in found[0].groups[1:] for rank in group) == wrong
    if wrong and not problem:
        right = mine[found[0].groups[0][0]][1]
        for rank in wrong:
            assert list(found[rank].values) == ["tensor 1"] and torch.equal(found[rank].values["tensor 1"], right)
        assert all(not found[rank].values for rank in range(world) if rank not in wrong)


def test_what_a_tensor_is_made_of_is_compared_and_can_be_written() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    pair = TwoTensor(torch.zeros(3), torch.ones(3))
    parts = dict(plain("w", pair))
    assert set(parts) == {"w.a", "w.b"}
    parts["w.b"].copy_(torch.full((3,), 5.0))
    assert torch.equal(pair.b, torch.full((3,), 5.0))


def test_methods_built_on_others_hand_on_what_they_were_told() -> None:
    assert onebit_adam(3, verify_every=7, tie="first").exchange.verify_every == 7
    assert dtrain.dgc(verify_every=7).exchange.verify_every == 7
    made = fedkseed(verify_every=7, tie="first")
    assert (made.verify_every, made.tie) == (7, "first") and replace(made, tie="stop").tie == "stop"
    for make in (diloco, streaming_diloco, slowmo, dtrain.co2, dtrain.eager_diloco, fedavg_m, dtrain.ferret):
        spec = make(verify_every=7, tie="first")
        assert (spec.verify_every, spec.tie) == (7, "first")


def attached_tie(spec: Sync) -> str:
    attached: Attached = Replicas(spec, 1).attached[0]
    method: Any = attached.method
    tie: str = getattr(method, "_gradients", method)._guard._tie
    return tie


def test_a_sync_at_work_knows_the_rule() -> None:
    for spec in (every_step(tie="first"), diloco(tie="first"), sparta(tie="first"), dtrain.dgc(tie="first").exchange):
        assert attached_tie(spec) == "first"
