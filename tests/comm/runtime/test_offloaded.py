"""Outer state in host memory: the bits of the replicated one, and only the fragment at hand anywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dtrain import diloco, local_update, streaming_diloco
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.runtime.fragments import fragments
from dtrain.comm.runtime.loop_spec import OuterState
from dtrain.comm.runtime.outer_store.offloaded import OffloadedStore
from dtrain.compress import error_feedback, quantize
from dtrain.outer import adam, fedhyper, nesterov, sgd
from dtrain.testing.replicas import Replicas, equal

FEW_BITS = error_feedback(quantize(bits=4, block=64))
MAKERS: dict[str, Callable[[OuterState], LocalUpdate]] = {
    "diloco": lambda how: diloco(every_steps=3, compress=FEW_BITS, outer_state=how),
    "2 bits, coded": lambda how: diloco(
        every_steps=3, compress=error_feedback(quantize("least_squares", block=64)), outer_state=how, lossless=1
    ),
    "adam": lambda how: diloco(every_steps=2, outer=adam(lr=0.1), outer_state=how),
    "fedhyper": lambda how: diloco(every_steps=2, outer=fedhyper(), outer_state=how),
    "streaming": lambda how: streaming_diloco(
        every_steps=5, layers_per_fragment=1, overlap_steps=2, compress=FEW_BITS, outer_state=how
    ),
    "stale": lambda how: local_update(every_steps=3, outer=nesterov(), delay="stale", outer_state=how),
    "eager": lambda how: local_update(every_steps=3, outer=nesterov(), delay="eager", outer_state=how),
    "fragments, mixed": lambda how: local_update(
        every_steps=4, outer=nesterov(), fragments=fragments(1), mix=0.25, outer_state=how
    ),
    "after a warm-up": lambda how: local_update(every_steps=3, outer=sgd(lr=0.5), warmup_steps=4, outer_state=how),
}


def outer_state(replicas: Replicas, rank: int) -> list[dict[str, object]]:
    return [replicas.kept(rank, name) for name in ("anchor", "momentum", "variance")]  # type: ignore[misc]


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_replicated_one_to_the_bit(name: str) -> None:
    whole, offloaded = (Replicas(MAKERS[name](how), 3) for how in ("replicated", "offloaded"))
    for replicas in (whole, offloaded):
        replicas.train(4)
        if name != "eager":  # whose round fails for all
            replicas.pieces[1].values["layers.2.weight"][3] = math.nan
    for _ in range(10):
        whole.train(1)
        offloaded.train(1)
        assert all(equal(whole.live(rank), offloaded.live(rank)) for rank in range(3))
    for one, other in zip(outer_state(whole, 2), outer_state(offloaded, 2), strict=True):
        assert equal(one, other)  # type: ignore[arg-type]
    ends = [replicas.all(lambda rank, r=replicas: r.attached[rank].close_round()) for replicas in (whole, offloaded)]  # type: ignore[misc]
    assert ends[0] == ends[1] and equal(whole.live(0), offloaded.live(0)) and equal(whole.anchor, offloaded.anchor)


@pytest.mark.parametrize("name", MAKERS)
def test_a_stop_at_any_step_leaves_no_trace(name: str) -> None:
    whole, end = Replicas(MAKERS[name]("offloaded"), 2), Replicas(MAKERS[name]("offloaded"), 2)
    end.train(12)
    for _ in range(8):
        whole.train(1)
        again = whole.resumed()
        again.train(12 - again.attached[0].steps)
        assert all(equal(again.live(rank), end.live(rank)) for rank in range(2))


@pytest.mark.parametrize("name", MAKERS)
def test_between_rounds_all_of_it_lies_in_host_memory(name: str) -> None:
    replicas = Replicas(MAKERS[name]("offloaded"), 2)
    places: set[int] = set()
    for _ in range(9):
        replicas.train(1)
        attached = replicas.attached[0]
        store = attached.method.store  # type: ignore[attr-defined]
        assert isinstance(store, OffloadedStore)
        kept = [
            tensor
            for named in attached.state.tensors.values()
            for name, tensor in named.items()
            if name in ("anchor", *attached.method.spec.outer.kinds)  # type: ignore[attr-defined]
        ]
        assert {tensor.data_ptr() for tensor in kept} == {host.data_ptr() for host in store._host.values()}
        places = places or {tensor.data_ptr() for tensor in kept}
        assert places <= {tensor.data_ptr() for tensor in kept}  # the same pages, all the time


def test_a_step_ahead_the_fragment_that_will_be_needed_is_fetched() -> None:
    spec = streaming_diloco(every_steps=4, layers_per_fragment=1, overlap_steps=1, outer_state="offloaded")
    replicas = Replicas(spec, 2)
    attached = replicas.attached[0]
    store = attached.method.store  # type: ignore[attr-defined]
    assert isinstance(store, OffloadedStore)
    seen = []
    for _ in range(9):
        replicas.train(1)
        seen.append(sorted({fqn for fqn, _ in store._ahead}))
    everything = sorted(fqn for fragment in attached.method.cadence.fragments for fqn in fragment.fqns)  # type: ignore[attr-defined]
    assert any(not fetched for fetched in seen) and any(fetched for fetched in seen)
    assert all(fetched != everything for fetched in seen)


def test_evaluation_and_repair() -> None:
    replicas = Replicas(MAKERS["diloco"]("offloaded"), 3)
    replicas.train(4)
    before, anchor = replicas.live(1), replicas.anchor

    def look(rank: int) -> object:
        with replicas.attached[rank].evaluation():
            return replicas.live(rank)

    assert all(equal(seen, anchor) for seen in replicas.all(look))  # type: ignore[arg-type]
    assert equal(replicas.live(1), before)
    for tensors in replicas.attached[2].state.tensors.values():
        tensors["anchor"][0] += 1

    with pytest.warns(RuntimeWarning, match="anchor"):
        assert replicas.all(lambda rank: replicas.attached[rank].verify()) == [False] * 3
    assert equal(replicas.kept(2, "anchor"), anchor)


def test_sharding_and_an_overlap_exclude_each_other_there_too() -> None:
    with pytest.raises(ValueError, match="does not overlap rounds"):
        streaming_diloco(outer_state="sharded")
