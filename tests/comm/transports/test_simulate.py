"""simulate: the reply of every op, and ranks that diverge are an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Flow, Op, Payload, Shift
from dtrain.comm.transports.simulate import simulate
from tests.comm.zoo import DTYPES, SHAPES, once, same, seeds, worlds

shapes = st.lists(st.sampled_from(SHAPES), max_size=4)
mixed = st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), max_size=4)


def payload(seed: int, layout: list[tuple[tuple[int, ...], torch.dtype]]) -> Payload:
    generator = torch.Generator().manual_seed(seed)
    return tuple((100 * torch.randn(shape, generator=generator)).abs().to(dtype) for shape, dtype in layout)


@given(worlds, mixed, seeds)
@settings(max_examples=30)
def test_all_gather_gives_everybody_all_payloads_in_rank_order(
    world: int, layout: list[tuple[tuple[int, ...], torch.dtype]], seed: int
) -> None:
    sent = [payload(seed + rank, layout) for rank in range(world)]
    for reply in simulate([once(AllGather(p)) for p in sent]):
        for rank in range(world):
            assert same(tuple(tensor[rank] for tensor in reply), sent[rank])


@given(worlds, mixed, seeds)
@settings(max_examples=30)
def test_all_to_all_transposes(world: int, layout: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> None:
    rows = [((world, *shape), dtype) for shape, dtype in layout]
    sent = [payload(seed + rank, rows) for rank in range(world)]
    replies = simulate([once(AllToAll(p)) for p in sent])
    for here in range(world):
        for there in range(world):
            assert same(tuple(t[there] for t in replies[here]), tuple(t[here] for t in sent[there]))


@given(worlds, shapes, seeds, st.sampled_from([torch.float32, torch.float64, torch.int64]))
@settings(max_examples=30)
def test_all_reduce_adds_in_rank_order(
    world: int, layout: list[tuple[int, ...]], seed: int, dtype: torch.dtype
) -> None:
    sent = [payload(seed + rank, [(shape, dtype) for shape in layout]) for rank in range(world)]
    totals: list[Tensor] = []
    for column in zip(*sent, strict=True):
        total = torch.zeros_like(column[0])
        for tensor in column:
            total = total + tensor
        totals.append(total)
    for reply in simulate([once(AllReduce(p, "sum")) for p in sent]):
        assert same(reply, tuple(totals))
    for reply in simulate([once(AllReduce(p, "mean")) for p in sent]):
        assert same(reply, tuple(total / world for total in totals))


@given(worlds, mixed, seeds, st.data())
@settings(max_examples=30)
def test_broadcast_and_shift(
    world: int, layout: list[tuple[tuple[int, ...], torch.dtype]], seed: int, data: st.DataObject
) -> None:
    sent = [payload(seed + rank, layout) for rank in range(world)]
    source, by = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, world - 1))
    for reply in simulate([once(Broadcast(p, source=source)) for p in sent]):
        assert same(reply, sent[source])
    ring = [Shift(p, destination=(r + by) % world, source=(r - by) % world) for r, p in enumerate(sent)]
    for rank, reply in enumerate(simulate([once(op) for op in ring])):
        assert same(reply, sent[(rank - by) % world])


MAKERS: dict[str, Callable[[Payload, int], Op]] = {
    "all_reduce": lambda p, rank: AllReduce(p),
    "all_gather": lambda p, rank: AllGather(p),
    "all_to_all": lambda p, rank: AllToAll(p),
    "broadcast": lambda p, rank: Broadcast(p),
    "shift": lambda p, rank: Shift(p, destination=1 - rank, source=1 - rank),
}


@pytest.mark.parametrize("name", MAKERS)
def test_replies_are_nobody_elses_memory(name: str) -> None:
    sent = [torch.full((2, 3), float(rank)) for rank in range(2)]
    replies = simulate([once(MAKERS[name]((tensor,), rank)) for rank, tensor in enumerate(sent)])
    expected = replies[1][0].clone()
    replies[0][0].fill_(-1)
    assert [float(tensor.min()) for tensor in sent] == [0.0, 1.0]
    assert torch.equal(replies[1][0], expected)


def test_results_come_in_rank_order_with_and_without_ops() -> None:
    def talks(rank: int, rounds: int) -> Flow[int]:
        for _ in range(rounds):
            yield AllGather((torch.tensor(rank),))
        return rank

    assert simulate([talks(rank, 3) for rank in range(4)]) == [0, 1, 2, 3]
    assert simulate([talks(rank, 0) for rank in range(4)]) == [0, 1, 2, 3]
    no_ranks: list[Flow[int]] = []
    assert simulate(no_ranks) == []


def test_the_error_of_a_flow_is_not_swallowed() -> None:
    def bad(rank: int) -> Flow[None]:
        yield AllGather((torch.zeros(1),))
        if rank == 1:
            raise ZeroDivisionError("rank 1 divides")

    with pytest.raises(ZeroDivisionError, match="rank 1 divides"):
        simulate([bad(rank) for rank in range(3)])


a = torch.zeros(2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(AllReduce((a,)), AllGather((a,)), id="kind"),
        pytest.param(AllGather((a,)), AllGather((a.view(2, 1),)), id="shape"),
        pytest.param(AllGather((a,)), AllGather((torch.zeros(3),)), id="size"),
        pytest.param(AllGather((a,)), AllGather((a.double(),)), id="dtype"),
        pytest.param(AllGather((a,)), AllGather((a, a)), id="number of tensors"),
        pytest.param(AllReduce((a,), "sum"), AllReduce((a,), "mean"), id="combine"),
        pytest.param(AllReduce((a,)), AllReduce((a,), axis="shard"), id="axis"),
        pytest.param(Broadcast((a,), source=0), Broadcast((a,), source=1), id="source of a broadcast"),
    ],
)
@pytest.mark.parametrize("late", [0, 2])
def test_ranks_that_yield_different_ops_are_an_error(one: Op, other: Op, late: int) -> None:
    def flow(op: Op) -> Flow[None]:
        for _ in range(late):
            yield AllGather((a,))
        yield op

    with pytest.raises(RuntimeError, match=rf"op {late} differs.*rank 2"):
        simulate([flow(one), flow(one), flow(other)])


def test_a_rank_that_ends_early_is_an_error() -> None:
    def flow(rounds: int) -> Flow[None]:
        for _ in range(rounds):
            yield AllGather((a,))

    with pytest.raises(RuntimeError, match=r"ranks \[1\] have finished while others still yield AllGather"):
        simulate([flow(3), flow(2), flow(3)])


def test_each_axis_has_its_groups() -> None:
    def flow(rank: int) -> Flow[tuple[list[int], list[int]]]:
        (shards,) = yield AllGather((torch.tensor(rank),), axis="shard")
        (replicas,) = yield AllGather((torch.tensor(rank),))
        return shards.tolist(), replicas.tolist()

    found = simulate([flow(rank) for rank in range(6)], shards=2)
    assert found[3] == ([2, 3], [1, 3, 5]) and found[4] == ([4, 5], [0, 2, 4])
    assert simulate([flow(rank) for rank in range(2)]) == [([0], [0, 1]), ([1], [0, 1])]


def test_ranks_that_go_across_other_axes_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="rank 0 goes across the shard axis, rank 1 does not"):
        simulate([once(AllReduce((a,), axis="shard")), once(AllReduce((a,)))])


def test_a_shift_that_its_peer_does_not_receive_is_an_error() -> None:
    # Rank 0 sends to 1, which waits for itself: real processes would hang.
    ops = [Shift((a,), destination=1, source=1), Shift((a,), destination=1, source=1)]
    with pytest.raises((RuntimeError, ValueError)):
        simulate([once(op) for op in ops])


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_an_all_to_all_with_other_rows_than_ranks_is_an_error(rows: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        simulate([once(AllToAll((torch.zeros(rows, 5),))) for _ in range(2)])


def test_a_sum_over_two_dtypes_is_refused() -> None:
    mixed = AllReduce((torch.ones(1), torch.ones(1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="sums one dtype"):
        simulate([once(mixed), once(mixed)])
