"""Layout: cuts cover everything once, and can be undone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm.layout import Segment, chunk_width, even_slice, from_rows, is_finite, to_rows
from tests.comm.zoo import NUMELS, draw, seeds

parts_of_a_whole = st.integers(1, 9)
sizes = st.one_of(st.sampled_from(NUMELS), st.integers(0, 300))


@given(sizes, parts_of_a_whole)
def test_even_slices_cover_each_element_once_in_order(numel: int, parts: int) -> None:
    slices = [even_slice("w", numel, part=part, parts=parts) for part in range(parts)]
    covered = [element for piece in slices for element in range(piece.offset, piece.stop)]
    assert covered == list(range(numel))
    assert all(piece.fqn == "w" and 0 <= piece.offset <= piece.stop <= numel for piece in slices)
    lengths = [piece.numel for piece in slices]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) == chunk_width(numel, parts)


@given(sizes, parts_of_a_whole)
def test_a_chunk_is_as_narrow_as_it_can_be(numel: int, parts: int) -> None:
    width = chunk_width(numel, parts)
    assert width * parts >= numel and (width == 0 or (width - 1) * parts < numel)


@given(sizes, parts_of_a_whole, seeds)
def test_rows_are_the_slices_and_then_zeros(numel: int, parts: int, seed: int) -> None:
    flat = draw(seed, numel)
    rows = to_rows(flat, parts)
    assert rows.shape == (parts, chunk_width(numel, parts))
    assert torch.equal(from_rows(rows, numel), flat)
    for part in range(parts):
        piece = even_slice("w", numel, part=part, parts=parts)
        assert torch.equal(rows[part, : piece.numel], flat[piece.offset : piece.stop])
        assert not rows[part, piece.numel :].any()


def test_rows_are_copied_only_where_they_must_be_padded() -> None:
    flat = torch.arange(12.0)
    assert to_rows(flat, 4).data_ptr() == flat.data_ptr()
    padded = to_rows(flat, 5)
    padded.fill_(-1)
    assert torch.equal(flat, torch.arange(12.0))


@given(sizes, parts_of_a_whole, st.sampled_from([torch.uint8, torch.bfloat16, torch.int64]))
def test_rows_of_any_dtype(numel: int, parts: int, dtype: torch.dtype) -> None:
    flat = torch.arange(numel).to(dtype)
    rows = to_rows(flat, parts)
    assert rows.dtype == dtype and torch.equal(from_rows(rows, numel), flat)


def test_segments_sort_by_name_and_place() -> None:
    one, two, three = Segment("a", 0, 3), Segment("a", 3, 1), Segment("b", 0, 9)
    assert sorted([three, two, one]) == [one, two, three]
    assert one.stop == two.offset == 3
    assert len({one, Segment("a", 0, 3)}) == 1


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([torch.ones(3), torch.empty(0), torch.ones(2, dtype=torch.bfloat16)], True),
        ([torch.full((4,), 3e38)], True),  # whose sum is not
        ([torch.full((2,), 3e38), torch.full((2,), -3e38)], True),
        ([torch.ones(3), torch.tensor([1.0, float("inf")])], False),
        ([torch.tensor([float("inf")]), torch.tensor([-float("inf")])], False),
        ([torch.full((4,), 3e38), torch.tensor([float("nan")])], False),
    ],
)
def test_what_is_finite(values: list[torch.Tensor], finite: bool) -> None:
    assert is_finite(*values) is finite
