"""Which checkpoints stay, which are replaced, and which may never be touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.errors import CheckpointError
from dtrain.train.checkpoint import full_parameters, newest
from dtrain.train.checkpoint.folders import step_folders, step_of

Save = Callable[..., Path]


def steps(folder: Path) -> list[int | None]:
    return [step_of(path) for path in step_folders(folder)]


def value(path: Path) -> float:
    return float(full_parameters(path)["b.bias"][0])


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_keep_stay(keep: int, save: Save, tmp_path: Path) -> None:
    for step in range(1, 6):
        assert newest(tmp_path) != save(step, keep=keep)
    assert steps(tmp_path) == list(range(6 - keep, 6))


def test_the_one_resumed_from_stays_however_old(save: Save, tmp_path: Path) -> None:
    first = save(1)
    for step in (2, 3, 4, 5):
        save(step, resumed_from=first)
    assert steps(tmp_path) == [1, 4, 5]
    save(6)
    assert steps(tmp_path) == [5, 6]


def test_a_run_taken_back_goes_on_from_what_it_wrote_last(save: Save, tmp_path: Path) -> None:
    first = save(10)
    save(20, keep=5)
    save(30, keep=5)
    path = save(15, keep=2, resumed_from=first)
    assert newest(tmp_path) == path
    assert steps(tmp_path) == [10, 15, 30]


def test_a_rerun_replaces_the_same_step(save: Save, tmp_path: Path) -> None:
    first, old = save(1), save(2)
    assert value(old) == 200.0
    rewritten = save(2, resumed_from=first, anchor=True)
    assert rewritten == old == newest(tmp_path) and value(old) == -200.0
    save(2, anchor=False)
    assert newest(tmp_path) == old and value(old) == 200.0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", first.name, old.name]


@pytest.mark.parametrize("step", [1, 2])
def test_the_one_resumed_from_is_never_overwritten(step: int, save: Save, tmp_path: Path) -> None:
    save(1)
    second = save(2)
    with pytest.raises(CheckpointError, match="step-0000000002, which this run was resumed from"):
        save(step, resumed_from=second, anchor=True)
    assert value(second) == 200.0 and steps(tmp_path) == [1, 2]


def test_one_resumed_from_in_another_folder_forbids_nothing(save: Save, tmp_path: Path) -> None:
    save(1)
    assert save(2, resumed_from=tmp_path / "elsewhere" / "step-0000000009") == newest(tmp_path)


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_fewer_than_two_are_refused(keep: int, save: Save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"keep={keep}"):
        save(1, keep=keep)
    assert list(tmp_path.iterdir()) == []


def test_a_negative_step_is_refused(save: Save) -> None:
    with pytest.raises(CheckpointError, match="step=-1"):
        save(-1)


def test_damaged_and_foreign_folders_are_neither_counted_nor_deleted(save: Save, tmp_path: Path) -> None:
    damaged = save(1)
    (damaged / "manifest.json").unlink()
    foreign = [tmp_path / "notes", tmp_path / "step-12", tmp_path / "step-0000000001.corrupt-0"]
    for path in foreign:
        path.mkdir()
    for step in (2, 3, 4):
        save(step)
    assert damaged.is_dir() and all(path.is_dir() for path in foreign)
    assert steps(tmp_path) == [1, 3, 4]
