"""Runs that several laws look at are trained once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.testing import WorkerPool
from tests.laws.jobs import Finished, run

TEXT_SEED = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        words = TEXT_SEED.split()
        lines = [" ".join(words[(number + i * i) % 16 :] + words[: (i + number) % 16]) for i in range(60)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines))
    return folder


Undisturbed = Callable[[str, str], Finished]


@pytest.fixture(scope="session")
def undisturbed(pool: WorkerPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """60 steps of (engine, sync) on 2 replicas x 2 shards, in one go."""
    done: dict[tuple[str, str], Finished] = {}

    def get(engine: str, sync: str) -> Finished:
        if (engine, sync) not in done:
            folder = tmp_path_factory.mktemp(f"{engine}-{sync}") / "run"
            done[engine, sync] = run(pool, folder, text, engine, sync)
        return done[engine, sync]

    return get


@pytest.fixture(scope="session")
def stopped(pool: WorkerPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A copy of a run of (engine, sync) that was stopped at step 30 of 60; each call gives a copy of its own."""
    done: dict[tuple[str, str], Finished] = {}

    def get(engine: str, sync: str) -> Finished:
        if (engine, sync) not in done:
            folder = tmp_path_factory.mktemp(f"{engine}-{sync}") / "run"
            done[engine, sync] = run(pool, folder, text, engine, sync, "train.stop_after_steps=30")
        copy = tmp_path_factory.mktemp(f"{engine}-{sync}-copy") / "run"
        shutil.copytree(done[engine, sync].folder, copy)
        return Finished(copy, done[engine, sync].outcomes)

    return get
