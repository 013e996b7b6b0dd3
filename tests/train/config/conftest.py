"""A folder with a little text, and the words of a configuration error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.train.config import Config, compose


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Enough text for both splits in blocks of 16 bytes."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text("\n".join(f"{i} times {number} is {i * number}" for i in range(40)))
    return folder


@functools.cache
def _composed(*overrides: str) -> Config:
    # hydra takes a tenth of a second, and most tests want the same few configurations.
    return compose(["run.dir=HERE", "data.path=TEXT", "data.block=16", *overrides])


@pytest.fixture
def make(tmp_path: Path, text: Path) -> Callable[..., Config]:
    """make(*overrides): a small configuration that is valid as it is, with its run folder in tmp_path/run."""

    def made(*overrides: str) -> Config:
        config = _composed(*overrides)
        if config.run.dir == "HERE":
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "run")))
        if config.data.get("path") == "TEXT":
            config = dataclasses.replace(config, data={**config.data, "path": str(text)})
        return config

    return made
