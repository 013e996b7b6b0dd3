"""Whole matrices of a sharded model: assembled on their owners, worked on once, returned to where they came from."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.inner_optimizers.owners import Replica, balanced
from dtrain.comm.layout import Segment
from dtrain.comm.ops import Place
from dtrain.comm.transports.meter import Meter, metered
from dtrain.comm.transports.simulate import simulate


@st.composite
def cuts(draw: st.DrawFn) -> tuple[dict[str, int], list[dict[str, Segment]]]:
    """Sizes of some matrices, and for each of 2 to 4 ranks a segment of each; together they hold all of it once."""
    ranks = draw(st.integers(2, 4))
    sizes = {f"m{n}": draw(st.integers(1, 30)) for n in range(draw(st.integers(1, 5)))}
    held: list[dict[str, Segment]] = [{} for _ in range(ranks)]
    for fqn, size in sizes.items():
        borders = [0, *sorted(draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))), size]
        for rank in range(ranks):
            held[rank][fqn] = Segment(fqn, borders[rank], borders[rank + 1] - borders[rank])
    return sizes, held


@given(cuts())
def test_each_matrix_is_worked_on_once_as_a_whole(cut: tuple[dict[str, int], list[dict[str, Segment]]]) -> None:
    sizes, held = cut
    matrices = {fqn: torch.randn(size) for fqn, size in sizes.items()}
    seen: list[str] = []

    def work(wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for fqn, whole in wholes.items():
            assert torch.equal(whole, matrices[fqn])
        seen.extend(wholes)
        return {fqn: whole.cumsum(0) for fqn, whole in wholes.items()}

    flows = []
    for rank, segments in enumerate(held):
        pieces = {fqn: matrices[fqn][s.offset : s.stop] for fqn, s in segments.items()}
        flows.append(Replica(held, Place(rank, len(held)), whole=False).work(pieces, work, sizes))
    results = simulate(flows, shards=len(held))
    assert sorted(seen) == sorted(sizes)
    for segments, result in zip(held, results, strict=True):
        assert list(result) == list(sizes)
        for fqn, s in segments.items():
            assert torch.equal(result[fqn], matrices[fqn].cumsum(0)[s.offset : s.stop])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_where_all_hold_everything_only_results_are_sent(ranks: int) -> None:
    matrices = {f"m{n}": torch.randn(10 * n + 4) for n in range(4)}
    sizes = {fqn: matrix.numel() for fqn, matrix in matrices.items()}
    seen: list[str] = []

    def work(wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.extend(wholes)
        return {fqn: 2 * whole for fqn, whole in wholes.items()}

    meters = [Meter() for _ in range(ranks)]
    flows = [
        metered(
            Replica([], Place(rank, ranks), whole=True).work(matrices, work, sizes), meters[rank],
            {"shard": Place(rank, ranks)}, "inner optimizer",
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for result in simulate(flows, shards=ranks):
        assert all(torch.equal(result[fqn], 2 * matrix) for fqn, matrix in matrices.items())
    assert sorted(seen) == sorted(matrices)
    owner = balanced(sizes, ranks)
    widest = max(sum(sizes[fqn] for fqn in sizes if owner[fqn] == rank) for rank in range(ranks))
    for meter in meters:
        assert meter.sent_bytes == 0  # nothing across the slow links
        assert sum(count.bytes for count in meter.by.values()) == (ranks - 1) * 4 * widest


def test_bytes_of_two_equal_halves_are_those_of_a_matrix() -> None:
    """Two ranks, two equal matrices: each sends half of one there, and half of one back."""
    held = [{fqn: Segment(fqn, 50 * rank, 50) for fqn in "ab"} for rank in range(2)]
    meters = [Meter() for _ in range(2)]
    flows = [
        metered(
            Replica(held, Place(rank, 2), whole=False).work(
                {fqn: torch.ones(50) for fqn in "ab"}, dict, {"a": 1, "b": 1}
            ),
            meters[rank], {"shard": Place(rank, 2)}, "inner optimizer",
        )
        for rank in range(2)
    ]  # fmt: skip
    simulate(flows, shards=2)
    assert [sum(count.bytes for count in meter.by.values()) for meter in meters] == [400, 400]
