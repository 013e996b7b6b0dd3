"""Seeds: a function of what is drawn, and of nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm.seeds import FIRST_PHASE, SECOND_PHASE, Key

CPU = torch.device("cpu")
keys = st.builds(
    Key,
    seed=st.integers(0, 2**63),
    step=st.integers(0, 2**40),
    rank=st.integers(-1, 1000),
    fqn=st.sampled_from(["", "w", "layers.0.weight", "layers.0.weight1", "größe"]),
    phase=st.sampled_from(["", "send", "answer"]),
)


def drawn(key: Key) -> list[int]:
    return torch.randint(0, 2**40, (4,), generator=key.generator(CPU)).tolist()


@given(keys)
def test_equal_keys_draw_equal_numbers_and_touch_nothing_global(key: Key) -> None:
    before = torch.get_rng_state()
    first = drawn(key)
    torch.rand(3, generator=key.generator(CPU))
    assert drawn(replace(key)) == first
    assert torch.equal(torch.get_rng_state(), before)


@given(keys, keys)
def test_different_keys_draw_different_numbers(one: Key, other: Key) -> None:
    assert (drawn(one) == drawn(other)) == (one == other)


def test_each_field_counts_and_none_runs_into_the_next() -> None:
    base = Key(1, 1, 1, "1", "1")
    others = [Key(11, 1, 1, "1", "1"), Key(1, 11, 1, "1", "1"), Key(1, 1, 11, "1", "1"), Key(1, 1, 1, "11", "1")]
    others += [Key(1, 1, 1, "1", "11"), Key(1, 1, 1, "11", ""), Key(1, 1, 1, "", "11"), Key(1, 1, -1, "1", "1")]
    assert len({tuple(drawn(key)) for key in [base, *others]}) == 1 + len(others)


GOLDEN = (4222239436098744251, 9011696867776704652)


def test_seeds_are_the_same_on_every_machine_and_in_every_release() -> None:
    """A run that is resumed elsewhere goes on with the same numbers; these were written down once."""
    assert Key(0, 0).generator(CPU).initial_seed() == GOLDEN[0]
    assert Key(7, 123, 2, "layers.0.weight", FIRST_PHASE).generator(CPU).initial_seed() == GOLDEN[1]
    assert Key(1, 2, 3, "w", SECOND_PHASE).generator(CPU).initial_seed() == 8292006041183245838
