"""Training leaves no thread and no descriptor in a process that goes on, as a notebook or a sweep does."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest

from dtrain.testing import WorkerPool
from dtrain.train.config import Config, compose
from dtrain.train.trainer import train
from tests.laws.jobs import SMALL
from tests.sync_words import sync_words

pytestmark = pytest.mark.timeout(180)

KINDS = (("ddp", "int8_ef"), ("fsdp", "diloco"), ("zero1", "streaming_diloco"))
TIMES = 3


def trained_often(configs: list[Config]) -> list[tuple[int, int]]:
    """Threads and descriptors behind each round of trainings."""
    found = []
    for number in range(TIMES):
        for config in configs[number * len(KINDS) : (number + 1) * len(KINDS)]:
            train(config)
        gc.collect()
        time.sleep(1)  # threads that are on their way out
        found.append((len(list(Path("/proc/self/task").iterdir())), len(os.listdir("/proc/self/fd"))))
    return found


def test_many_trainings_in_one_process(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    configs = []
    for number in range(TIMES):
        for engine, sync in KINDS:
            folder = tmp_path / f"{number}-{engine}-{sync}"
            folder.mkdir()
            chosen = [f"engine={engine}", *sync_words(sync), f"run.dir={folder}", f"data.path={text}", *SMALL]
            mesh = ["mesh.replicate=2", "mesh.shard=1", "launcher.workers=2", "train.steps=3"]
            configs.append(compose([*chosen, *mesh]))
    for rows in pool.run(trained_often, configs, world=2):
        assert rows[2] <= rows[1], f"threads and descriptors: {rows}"
