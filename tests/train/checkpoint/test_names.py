"""Nothing that a checkpoint's files say leads out of its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.errors import CheckpointError
from dtrain.train.checkpoint import newest, verify
from dtrain.train.checkpoint.folders import LATEST
from dtrain.train.checkpoint.manifest import MANIFEST, _seal, data_name


@pytest.mark.parametrize("rank", ["../elsewhere/rank-00000", "/etc/passwd", -1, 99, "0/../0", None, "latest"])
def test_a_manifest_names_no_file_but_those_of_its_ranks(save: Callable[..., Path], rank: object) -> None:
    step = save(3)
    body = json.loads((step / MANIFEST).read_text())
    del body["crc32_of_the_rest"]
    body["files"][0]["rank"] = rank
    (step / MANIFEST).write_text(_seal(body))
    with pytest.raises(CheckpointError):
        verify(step)


@pytest.mark.parametrize("latest", ["../other/step-0000000009", "/", "step-0000000009", "\0", ""])
def test_nothing_believes_the_word_of_the_last_commit(save: Callable[..., Path], tmp_path: Path, latest: str) -> None:
    step = save(3)
    (tmp_path / "other").mkdir()
    shutil.copytree(step, tmp_path / "other" / "step-0000000009")
    (tmp_path / LATEST).write_text(latest)
    assert newest(tmp_path) == step
    assert (tmp_path / "other" / "step-0000000009" / data_name(0)).is_file()
