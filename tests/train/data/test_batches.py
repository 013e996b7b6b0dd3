"""What all ranks read together does not depend on how many they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.train.data.batches import evaluation_indices, fetch, positions


class Squares:
    """Example i is (i, i * i)."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        return {"root": torch.tensor([index]), "square": torch.tensor(float(index * index))}


@given(st.integers(0, 10**9), st.integers(1, 8), st.integers(1, 8))
def test_the_ranks_share_each_step_in_order(step: int, world: int, share: int) -> None:
    size = world * share
    shares = [positions(step, batch_size=size, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in shares} == {share}
    assert [place for part in shares for place in part] == list(range(step * size, (step + 1) * size))


def test_steps_follow_each_other_without_a_gap() -> None:
    places = [place for step in range(5) for place in positions(step, batch_size=6, rank=0, world=1)]
    assert places == list(range(30))


@pytest.mark.parametrize(
    ("size", "world", "way_out"), [(10, 4, "take 8 or 12"), (3, 4, "take 4"), (0, 2, "take 2"), (-4, 2, "take 2")]
)
def test_a_batch_that_does_not_divide_is_refused_with_the_way_out(size: int, world: int, way_out: str) -> None:
    with pytest.raises(ValueError, match=f"batch of {size} .* {world} ranks; {way_out}$"):
        positions(0, batch_size=size, rank=0, world=world)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_of_the_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank} of {world}"):
        positions(0, batch_size=4, rank=rank, world=world)
    with pytest.raises(ValueError, match=f"rank is {rank} of {world}"):
        evaluation_indices(10, 4, rank=rank, world=world)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        positions(-1, batch_size=4, rank=0, world=1)


def test_a_batch_stacks_the_examples_in_the_order_asked_for() -> None:
    batch = fetch(Squares(), [3, 1, 3])
    assert batch["root"].tolist() == [[3], [1], [3]]
    assert batch["square"].tolist() == [9.0, 1.0, 9.0]


@given(st.integers(0, 500), st.integers(0, 60), st.integers(1, 9))
def test_evaluation_examples_are_the_same_for_every_world(length: int, wanted: int, world: int) -> None:
    shares = [evaluation_indices(length, wanted, rank=rank, world=world) for rank in range(world)]
    together = [index for share in shares for index in share]
    assert together == evaluation_indices(length, wanted, rank=0, world=1)
    assert len(set(together)) == len(together) == min(wanted, length)
    assert all(0 <= index < length for index in together)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 500), st.integers(2, 60))
def test_evaluation_examples_are_spread_evenly(length: int, wanted: int) -> None:
    chosen = evaluation_indices(length, wanted, rank=0, world=1)
    gaps = {after - before for before, after in zip(chosen, [*chosen[1:], length], strict=True)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("length", "wanted"), [(-1, 2), (2, -1)])
def test_negative_sizes_are_refused(length: int, wanted: int) -> None:
    with pytest.raises(ValueError, match="neither can be negative"):
        evaluation_indices(length, wanted, rank=0, world=1)
