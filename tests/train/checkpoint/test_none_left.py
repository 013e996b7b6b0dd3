"""A run that had checkpoints never begins at step 0 because none can be used: that would cost its records, too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtrain.errors import ResumeError
from dtrain.train.checkpoint.finite import all_finite
from dtrain.train.checkpoint.folders import LATEST
from dtrain.train.checkpoint.manifest import MANIFEST
from dtrain.train.checkpoint_choice import look

Save = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose checkpoints are those that ``save`` writes."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(tmp_path)
    return folder


def flip(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("set_aside", [False, True])
def test_all_damaged_is_refused_with_each_reason_and_nothing_is_renamed(
    set_aside: bool, resume: str, save: Save, run: Path
) -> None:
    for path in (save(1), save(2)):
        flip(path)
    for _ in range(2):  # the second time, too
        with pytest.raises(ResumeError) as refused:
            look(run, resume, set_aside=set_aside)
        said = str(refused.value)
        assert "none of them can be used" in said and "run.weights=FILE" in said and "move " in said
        assert said.count("DAMAGED CHECKPOINT") == 2 and said.count("CRC-32") == 2


def test_what_is_left_of_a_run_says_that_it_was_one(save: Save, run: Path, tmp_path: Path) -> None:
    assert look(run, "auto", set_aside=True) is None  # nothing was committed yet
    (tmp_path / "step-0000000001.tmp-0").mkdir()
    assert look(run, "auto") is None
    older = save(1)
    flip(save(2))
    told: list[str] = []
    assert look(run, "auto", set_aside=True, tell=told.append) == run / "checkpoints" / older.name
    assert len(told) == 1 and "renamed to step-0000000002.corrupt-0" in told[0]
    shutil.rmtree(older)
    with pytest.raises(ResumeError, match=r"set aside as damaged before: step-0000000002.corrupt-0"):
        look(run, "auto")
    shutil.rmtree(tmp_path / "step-0000000002.corrupt-0")
    with pytest.raises(ResumeError, match="their folders are gone"):
        look(run, "auto")  # `latest` is there
    (run / "export").mkdir()
    (run / "export" / "model.safetensors").touch()
    with pytest.raises(ResumeError, match=r"run\.weights=\S*/run/export/model\.safetensors; to begin"):
        look(run, "auto")
    (tmp_path / LATEST).unlink()
    assert look(run, "auto") is None  # which is how one begins anew on purpose


def test_a_folder_that_was_moved_aside_for_another_is_a_checkpoint(save: Save, run: Path) -> None:
    path = save(1)
    path.rename(path.with_name(f"{path.name}.replaced-0"))
    assert look(run, "auto") is None
    assert look(run, "auto", set_aside=True) == run / "checkpoints" / path.name


def test_what_cannot_be_read_is_not_taken_for_damage(save: Save, run: Path) -> None:
    save(1)
    path = save(2)
    (path / MANIFEST).unlink()
    (path / MANIFEST).mkdir()  # as good as a file without rights, also to root
    with pytest.raises(ResumeError, match=r"cannot be read, .*make it readable again"):
        look(run, "auto", set_aside=True)
    assert path.is_dir()


def test_a_path_that_is_damaged_is_refused_by_its_name(save: Save, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    path = save(1)
    flip(path)
    for resume in (path, run):
        with pytest.raises(ResumeError, match=rf"run.resume={resume}(.|\n)*CRC-32"):
            look(other, str(resume))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64])
def test_every_kind_of_number_is_looked_at(dtype: torch.dtype) -> None:
    assert all_finite(torch.ones(3).to(dtype)) and all_finite(torch.ones(()).to(dtype))
    for bad in (float("nan"), float("inf")):
        assert not all_finite(torch.tensor([1.0, bad]).to(dtype))
