"""State: a step is stored everywhere or nowhere."""

from __future__ import annotations

import pytest
import torch

from dtrain.comm.state import State


def with_residual(value: float) -> State:
    state = State({"residual": "per_worker", "momentum": "replicated"})
    state.stage("w", "residual", torch.full((3,), value))
    state.commit()
    return state


def test_what_is_staged_is_seen_only_after_commit() -> None:
    state = with_residual(1.0)
    like = torch.zeros(3)
    state.stage("w", "residual", torch.full((3,), 2.0))
    assert torch.equal(state.get("w", "residual", like), torch.full((3,), 1.0))
    assert torch.equal(state.staged("w", "residual"), torch.full((3,), 2.0))
    state.commit()
    assert torch.equal(state.get("w", "residual", like), torch.full((3,), 2.0))
    with pytest.raises(KeyError):
        state.staged("w", "residual")


def test_rollback_forgets_what_was_staged() -> None:
    state = with_residual(1.0)
    state.stage("w", "residual", torch.full((3,), 2.0))
    state.stage("new", "momentum", torch.ones(1))
    state.rollback()
    state.commit()
    assert list(state.tensors) == ["w"]
    assert torch.equal(state.tensors["w"]["residual"], torch.full((3,), 1.0))


def test_commit_keeps_what_was_not_staged() -> None:
    state = with_residual(1.0)
    state.stage("w", "momentum", torch.ones(3))
    state.stage("v", "residual", torch.ones(2))
    state.commit()
    assert {fqn: sorted(named) for fqn, named in state.tensors.items()} == {
        "w": ["momentum", "residual"],
        "v": ["residual"],
    }


def test_what_is_not_there_yet_is_zero_in_fp32_or_better() -> None:
    state = with_residual(1.0)
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        found = state.get("unknown", "residual", torch.ones(2, 3, dtype=dtype))
        assert found.dtype == kept and torch.equal(found, torch.zeros(2, 3, dtype=kept))
    assert "unknown" not in state.tensors


def test_names_must_be_declared() -> None:
    state = with_residual(1.0)
    with pytest.raises(KeyError, match=r"state 'residuals' was not declared; declared are \['momentum', 'residual'\]"):
        state.stage("w", "residuals", torch.ones(3))
    with pytest.raises(KeyError, match=r"holds \['anchor'\], this sync keeps \['momentum', 'residual'\]"):
        state.load({"w": {"anchor": torch.ones(3), "residual": torch.ones(3)}})
    assert torch.equal(state.tensors["w"]["residual"], torch.full((3,), 1.0))  # as before the refused load


def test_load_replaces_everything_by_copies() -> None:
    state = with_residual(1.0)
    state.stage("w", "residual", torch.full((3,), 9.0))
    given = {"v": {"residual": torch.ones(2)}}
    state.load(given)
    given["v"]["residual"].fill_(7.0)
    state.commit()  # what was staged before belongs to the past
    assert list(state.tensors) == ["v"]
    assert torch.equal(state.tensors["v"]["residual"], torch.ones(2))


def test_a_state_is_what_it_saved() -> None:
    state, other = with_residual(4.0), State({"residual": "per_worker", "momentum": "replicated"})
    other.load(state.tensors)
    assert torch.equal(other.get("w", "residual", torch.zeros(3)), state.get("w", "residual", torch.zeros(3)))
    other.stage("w", "residual", torch.zeros(3))
    other.commit()
    assert torch.equal(state.tensors["w"]["residual"], torch.full((3,), 4.0))
