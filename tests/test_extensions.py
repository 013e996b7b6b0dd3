"""What a stranger adds, from outside of the package: a compressor in 1 file, a method in 2, an engine in 2.

Beside these files stands a name in a list or nothing at all: a method and a compressor are ``_target_``s. A launcher,
1 file, is tests/launchers/test_fourth_launcher.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, every_step
from dtrain.errors import ConfigError
from dtrain.testing import Replicas, check_compressor
from dtrain.testing.replicas import equal
from dtrain.train import engine_registry
from dtrain.train.config import compose, instantiate, validate
from dtrain.train.trainer import train
from tests.programs.tasks import network, squared_error

COMPRESSOR = '''
"""Halves: values as bf16."""
import torch

class Halves:
    delta, unbiased, homogeneous, linear = 0.9, False, False, False

    def row_bytes(self, n):
        return 2 * n

    def encode(self, rows, key):
        return (rows.bfloat16(),)

    def decode(self, payload, n, shared):
        return payload[0].float()
'''
METHOD = '''
"""Rounds whose outer step follows the signs of what the replicas moved."""
from dataclasses import dataclass

from dtrain import diloco

@dataclass(frozen=True)
class Signs:
    lr: float

    @property
    def kinds(self):
        return {}

    def step(self, fqn, anchor, delta, state, now=None):
        return anchor - self.lr * delta.sign()

def signed(*, every_steps, lr=1e-3, compress=None):
    return diloco(every_steps=every_steps, outer=Signs(lr), compress=compress)
'''
METHOD_CHOICE = """
defaults:
  - /compress@compress: none
  - _self_
_target_: strangers_method.signed
every_steps: 3
lr: 0.01
"""
ENGINE = '''
"""One replica, one rank: the plain module."""
import torch

from dtrain.comm.adapters.adapter import pieces_of
from dtrain.train.engines.contract import loss_of

class Plain:
    def __init__(self, model, optimizer, mesh, options):
        self.model, self.options, self.gradient_norm = model, options, 0.0
        self.optimizer = optimizer(model)
        self.pieces = pieces_of(model, self.optimizer, mesh.channel, overlap=False)

    def forward_backward(self, microbatches):
        losses = [loss_of(self.model, batch) for batch in microbatches]
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach()

    def clip(self):
        pass

    def evaluate(self, batch):
        with torch.no_grad():
            return loss_of(self.model, batch)

    def set_learning_rate(self, value):
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def close(self):
        pass
'''


class Stranger:
    """A folder that can be imported from, and the files in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def adds(self, **files: str) -> int:
        """``name__yaml="..."`` is a file of this text; returns how many files were written."""
        for name, text in files.items():
            path = self.folder / name.replace("__", "/").replace("/py", ".py").replace("/yaml", ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return len(files)


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Stranger(tmp_path)
    for name in [name for name in sys.modules if name.startswith("strangers_")]:
        del sys.modules[name]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(sync: object, steps: int = 60) -> list[float]:
    """Of a small network under ``sync``, on one rank."""
    model, found = DistributedDataParallel(network(8)), []
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.05), sync)  # type: ignore[arg-type]
    for step in range(steps):
        loss = squared_error(model, step, 0)
        loss.backward()
        attached.step()
        found.append(float(loss.detach()))
    attached.detach()
    return found


def test_a_compressor_is_one_file(stranger: Stranger, alone: None) -> None:
    assert stranger.adds(strangers_compressor__py=COMPRESSOR) == 1
    config = compose(["run.dir=x", "sync=dense", "sync.compress={_target_:strangers_compressor.Halves}"])
    import strangers_compressor  # type: ignore[import-not-found]

    check_compressor(strangers_compressor.Halves())
    curve = losses(every_step(compress=strangers_compressor.Halves()))
    assert curve == losses(instantiate(config.sync, "sync")) != losses(every_step())
    assert sum(curve[-10:]) < 0.7 * sum(curve[:10])


def test_a_method_is_two_files(stranger: Stranger, alone: None) -> None:
    """What computes it, and what the command line calls it."""
    assert stranger.adds(strangers_method__py=METHOD, sync__signed__yaml=METHOD_CHOICE) == 2
    config = compose([f"@{stranger.folder}", "run.dir=x", "sync=signed", "sync.every_steps=4"])
    sync = instantiate(config.sync, "sync")
    import strangers_method  # type: ignore[import-not-found]

    assert sync == strangers_method.signed(every_steps=4, lr=0.01)
    curve = losses(sync)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    replicas = Replicas(sync, world=3)  # type: ignore[arg-type]
    replicas.train(steps=8)
    assert equal(replicas.live(0), replicas.live(2))
    replicas.close()


def test_an_engine_is_two_files_and_a_line_of_the_registry(stranger: Stranger, alone: None) -> None:
    """What trains, and what the command line calls it."""
    assert stranger.adds(strangers_engine__py=ENGINE, engine__plain__yaml="name: plain\n") == 2
    text = stranger.folder / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text("\n".join(f"{i} times {number}" for i in range(60)))
    words = [
        f"@{stranger.folder}", f"run.dir={stranger.folder / 'run'}", "engine=plain", "sync=local_sgd",
        f"data.path={text}", "data.block=16", "model.dim=16", "model.layers=1", "model.heads=2", "train.steps=4",
        "train.batch_size=4", "train.evaluation_examples=4", "mesh.replicate=1", "mesh.shard=1", "launcher.workers=1",
    ]  # fmt: skip
    config = compose(words)
    with pytest.raises(ConfigError, match=r"engine\.name is plain"):
        validate(config)
    engine_registry.register("plain", "strangers_engine:Plain")
    try:
        validate(config)
        (stranger.folder / "run").mkdir()
        assert train(config).step == 4
    finally:
        engine_registry.unregister("plain")
