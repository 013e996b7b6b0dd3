"""Outer state sharded over the replicas: the bits of the replicated one, a part of its memory, the same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from dtrain import diloco, local_sgd, local_update, slowmo
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.runtime.fragments import fragments
from dtrain.comm.runtime.loop_spec import OuterState
from dtrain.comm.runtime.outer_store.sharded import ShardedStore
from dtrain.compress import quantize
from dtrain.outer import adam, nesterov, sgd
from dtrain.testing.replicas import Replicas, equal

MAKERS: dict[str, Callable[[OuterState], LocalUpdate]] = {
    "local_sgd": lambda how: local_sgd(every_steps=3, outer_state=how),
    "slowmo": lambda how: slowmo(every_steps=2, outer_state=how),
    "diloco": lambda how: diloco(every_steps=3, outer_state=how),
    "coded": lambda how: diloco(every_steps=3, outer_state=how, lossless=1),
    "adam": lambda how: diloco(every_steps=2, outer=adam(lr=0.1), outer_state=how),
    "fragments, mixed": lambda how: local_update(
        every_steps=4, outer=nesterov(), fragments=fragments(1), mix=0.25, outer_state=how
    ),
    "after a warm-up": lambda how: local_update(every_steps=3, outer=sgd(lr=0.5), warmup_steps=4, outer_state=how),
}


def pair(name: str, world: int) -> tuple[Replicas, Replicas]:
    return Replicas(MAKERS[name]("replicated"), world), Replicas(MAKERS[name]("sharded"), world)


def anchors(replicas: Replicas, rank: int) -> dict[str, object]:
    replicas.all(lambda each: replicas.attached[each].method.settle())
    return replicas.kept(rank, "anchor")  # type: ignore[return-value]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_it_is_the_replicated_one_to_the_bit(name: str, world: int) -> None:
    whole, sharded = pair(name, world)
    for _ in range(13):
        whole.train(1)
        sharded.train(1)
        assert all(equal(whole.live(rank), sharded.live(rank)) for rank in range(world))
    assert equal(whole.anchor, anchors(sharded, world - 1))  # type: ignore[arg-type]


def test_weights_and_a_replica_that_diverged() -> None:
    whole, sharded = pair("diloco", 3)
    for replicas in (whole, sharded):
        replicas.train(1)
        replicas.attached[0].weigh(7)
        replicas.train(3)
        replicas.pieces[1].values["layers.2.weight"][3] = math.nan
        replicas.train(5)
    assert all(equal(whole.live(rank), sharded.live(rank)) for rank in range(3))
    assert [attached.method.left_out for attached in sharded.attached] == [0, 1, 0]  # type: ignore[attr-defined]


def test_each_replica_keeps_its_part_and_they_send_no_more() -> None:
    whole, sharded = pair("diloco", 3)
    for replicas in (whole, sharded):
        replicas.train(7)
    for attached in sharded.attached:
        store = attached.method.store  # type: ignore[attr-defined]
        assert isinstance(store, ShardedStore)
        kept = sum(t.numel() for named in store.owned.tensors.values() for t in named.values())
        assert kept <= 2 * (1 + 3 + 21) and not any(attached.state.tensors.values())
    sent = [replicas.pieces[0].channel.meter.sent_as("round") for replicas in (whole, sharded)]
    assert sent[1] <= sent[0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_stop_at_any_step_leaves_no_trace(name: str) -> None:
    whole = Replicas(MAKERS[name]("sharded"), 3)
    end = Replicas(MAKERS[name]("sharded"), 3)
    end.train(12)
    for _ in range(8):
        whole.train(1)
        again = whole.resumed()
        again.train(12 - again.attached[0].steps)
        assert all(equal(again.live(rank), end.live(rank)) for rank in range(3))


def test_evaluation_shows_the_anchor_and_puts_the_parameters_back() -> None:
    replicas = Replicas(diloco(every_steps=4, outer_state="sharded"), 3)
    replicas.train(6)
    before = replicas.live(1)

    def look(rank: int) -> object:
        with replicas.attached[rank].evaluation():
            return replicas.live(rank)

    seen = replicas.all(look)
    assert equal(seen[0], seen[2]) and equal(seen[0], anchors(replicas, 0))  # type: ignore[arg-type]
    assert equal(replicas.live(1), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compress": quantize(bits=8)}, "outer_state='sharded' sends parameters as they are"),
        ({"overlap_steps": 1}, "outer_state='sharded' does not overlap rounds"),
        ({"delay": "stale"}, "outer_state='sharded' does not overlap rounds"),
    ],
)
def test_what_it_does_not_go_with(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        local_update(every_steps=3, outer=sgd(), outer_state="sharded", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outer_state is 'halved'; choose 'replicated', 'sharded' or 'offloaded'"):
        local_update(every_steps=3, outer=sgd(), outer_state="halved")  # type: ignore[arg-type]
