"""Links: what is issued takes its time on them, one op beside the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm.clock.network import Level, Link, Network, parsed
from dtrain.comm.clock.wire import Wire
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Shift, sent_bytes

spans = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=25)


@given(spans)
def test_no_time_of_a_link_is_given_twice_and_none_is_left_free_while_an_op_waits(
    issued: list[tuple[int, int]],
) -> None:
    """Against a link that is cut into slots of a second each."""
    wire, taken = Wire(parsed("link=8kbit nodes=2")), [False] * 1000
    for start, seconds in issued:
        ended = wire.carry(Shift((torch.zeros(seconds * 1000, dtype=torch.uint8),), 1, 1), 2, float(start))
        slots = [slot for slot in range(start, 1000) if not taken[slot]][:seconds]
        for slot in slots:
            taken[slot] = True
        assert ended == slots[-1] + 1
    assert sum(end - begin for begin, end in wire.busy) == sum(taken)
    assert wire.busy == sorted(wire.busy)
    assert all(one[1] < other[0] for one, other in zip(wire.busy, wire.busy[1:], strict=False))


OPS = (AllReduce, AllGather, AllToAll, Broadcast)


@given(
    st.sampled_from(OPS), st.integers(2, 64), st.integers(1, 5000), st.floats(1e3, 1e9), st.floats(0, 1),
    st.sampled_from(["gloo", "ring"]),
)  # fmt: skip
def test_the_closed_forms_of_the_alpha_beta_model(
    kind: type, n: int, elements: int, rate: float, alpha: float, backend: str
) -> None:
    """benchmarks.md section 7: T = k(n) l + v(n) S / B, with v = 2 (n - 1) / n and k = 2 (n - 1), gloo's 4 (n - 1)."""
    network = Network((Level("nodes", n, Link(rate, rate, alpha, alpha)),), backend)  # type: ignore[arg-type]
    rows = n * elements if kind is AllToAll else elements
    payload = (torch.zeros(rows).view(n, -1) if kind is AllToAll else torch.zeros(rows),)
    op: Op = kind(payload)
    whole = 4 * rows
    v = {AllReduce: 2 * (n - 1) * whole // n, AllGather: (n - 1) * whole, AllToAll: (n - 1) * whole // n}
    if kind in v:
        assert network.transfer(op, n) == v[kind] / rate
        assert v[kind] == sent_bytes(op, rank=0, world=n)
    k = {"ring": {AllReduce: 2 * (n - 1), AllGather: n - 1, AllToAll: 1, Broadcast: n - 1},
         "gloo": {AllReduce: 4 * (n - 1), AllGather: 2 * (n - 1), AllToAll: 2}}[backend]  # fmt: skip
    if kind in k:
        assert network.latency(op, n) == pytest.approx(k[kind] * alpha, rel=1e-9)


def test_an_all_to_all_fills_the_link_of_a_site_with_what_its_nodes_send() -> None:
    op = AllToAll((torch.zeros(8, 1000),))
    flat, sites = parsed("link=100mbit nodes=8"), parsed("link=100mbit sites=2 nodes=4")
    assert flat.transfer(op, 8) == 7 * 4000 / 12.5e6
    assert sites.transfer(op, 8) == pytest.approx(4 * 4 * 4000 / 12.5e6)
    ring = AllReduce((torch.zeros(8000),))
    assert flat.transfer(ring, 8) == sites.transfer(ring, 8)


def test_few_hops_of_a_ring_leave_a_site() -> None:
    op = AllGather((torch.zeros(1),))
    network = parsed("link=1gbit,40ms sites=2 nodes=4 node_link=10gbit,1ms backend=ring")
    assert network.latency(op, 8) == pytest.approx(7 * (2 * 0.040 + 6 * 0.001) / 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("link=0mbit,1ms nodes=2", "carries nothing"),
        ("link=-5mbit nodes=2", "carries nothing"),
        ("link=10mbit,-1ms nodes=2", "cannot be"),
        ("link=fast nodes=2", "no quantity"),
        ("link=10mbit,4 nodes=2", "units are us, ms, s"),
        ("nodes=0", "positive whole number"),
        ("link=10mbit", "how many replicas"),
        ("link=10mbit nodes=2 speed=3", "no word of a network"),
        ("link=10mbit nodes=2 nodes=3", "given twice"),
        ("link=10mbit nodes=2 rank_link=1gbit", "belongs to no units"),
        ("link=10mbit nodes=2 backend=smoke", "choose gloo or ring"),
    ],
)
def test_networks_that_cannot_be_are_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parsed(text)
