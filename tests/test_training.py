"""`dtrain.Trainer`: a model object trained in this process or in several, the same run as the command's, to the bit."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

import dtrain
from dtrain.errors import ConfigError, ResumeError
from dtrain.testing import WorkerPool
from dtrain.train.checkpoint.weights import weights_of

pytestmark = pytest.mark.timeout(120)

WORDS = ("engine=ddp", "sync=diloco", "sync.every_steps=4")
FEW = {"steps": 12, "batch_size": 8, "log_every_steps": 1, "agree_every_steps": 1}


class Net(nn.Module):
    """The next of fifty tokens, from the one before."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.register_buffer("offset", torch.full((1,), float(seed)))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.head(self.embedding(batch["x"])).flatten(0, 1), batch["y"].flatten())


def examples(count: int = 80, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (count, 6), generator=generator)
    return [{"x": row, "y": (7 * row + 3) % 50} for row in tokens]


def head(model: nn.Module) -> Tensor:
    return cast(Net, model).head.weight


def trainer(folder: Path, net: nn.Module, *words: str, **settings: object) -> dtrain.Trainer:
    held: dict[str, object] = {"run": {"dir": folder}, "train": FEW, "optim": {"inner": {"lr": 0.05}}, **settings}
    return dtrain.Trainer(
        *WORDS, *words, model=net, data=examples(), validation=examples(8, 2), on_row=lambda row: None, **held
    )


def test_an_object_is_trained_in_this_process(tmp_path: Path) -> None:
    net, before = Net(), {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    results = trainer(tmp_path, net).train()
    assert (results.reason, results.step, results.folder, results.weights) == ("finished", 12, tmp_path, tmp_path)
    losses = [cast(float, row["loss"]) for row in results.rows if "loss" in row]
    assert len(losses) == 12 and results.loss == losses[-1] < losses[0]
    batch = {name: torch.stack([example[name] for example in examples(8, 2)]) for name in ("x", "y")}
    assert not net.training and float(net(batch).detach()) == pytest.approx(results.validation_loss, rel=1e-6)
    assert not torch.equal(net.head.weight, before["head.weight"])
    assert not torch.distributed.is_initialized() and "RANK" not in os.environ
    # What is in the object is what the run exported.
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in weights_of(tmp_path).items())
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    assert torch.equal(dtrain.load(checkpoint, model=Net(5)).get_buffer("offset"), net.get_buffer("offset"))
    assert torch.equal(head(dtrain.load(tmp_path, model=Net(5))), net.head.weight)


def test_interrupted_and_called_again_it_never_stopped(tmp_path: Path) -> None:
    whole, net = Net(), Net()
    trainer(tmp_path / "whole", whole).train()

    def interrupt(row: object) -> None:
        if isinstance(row, dict) and row["step"] == 6 and "loss" in row and not stopped:
            stopped.append(6)
            os.kill(os.getpid(), signal.SIGINT)

    stopped: list[int] = []
    parts = trainer(tmp_path / "parts", net)
    parts._on_row = interrupt
    with pytest.raises(KeyboardInterrupt, match=r"checkpointed at step \d+; the same call resumes there"):
        parts.train()
    assert stopped and not torch.equal(net.head.weight, whole.head.weight)
    results = parts.train()
    assert results.step == 12 and [row["step"] for row in results.rows if "loss" in row] == list(range(1, 13))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))


def test_a_run_that_has_ended_is_not_trained_again(tmp_path: Path) -> None:
    first = trainer(tmp_path, Net()).train()
    again = Net(3)
    second = trainer(tmp_path, again).train()
    assert second.rows == first.rows and torch.equal(again.head.weight, head(dtrain.load(tmp_path, model=Net())))


def trained(folder: Path, *words: str) -> tuple[str, list[float], list[float]]:
    """One rank of a run of an object that each rank has drawn anew."""
    net = Net(seed=int(os.environ["RANK"]))
    results = trainer(folder, net, *words).train()
    return results.reason, [cast(float, row["loss"]) for row in results.rows if "loss" in row], net.head.bias.tolist()


@pytest.mark.parametrize("words", [("mesh.shard=2", "engine=fsdp"), ("engine=zero2",)])
def test_several_processes_begin_and_end_with_one_model(
    words: tuple[str, ...], pool: WorkerPool, tmp_path: Path
) -> None:
    one, other = pool.run(trained, tmp_path, *words, world=2)
    assert one == other and one[0] == "finished" and one[1][-1] < one[1][0]


def by_words(folder: Path) -> str:
    """One rank of a run that a command line could have named."""
    dtrain.Trainer(*OF_THE_COMMAND, f"run.dir={folder}", on_row=lambda row: None).train()
    return str(folder)


OF_THE_COMMAND = (
    "engine=ddp", "model.dim=32", "model.layers=1", "model.heads=2", "data.block=32", "train.batch_size=4",
    "train.steps=6", "train.evaluation_examples=4", "optim.warmup_steps=2",
)  # fmt: skip


def test_it_is_the_same_run_as_the_commands(pool: WorkerPool, tmp_path: Path) -> None:
    from dtrain.train.config import compose
    from tests.laws.jobs import train_once

    pool.run(by_words, tmp_path / "trainer", world=2)
    config = compose([*OF_THE_COMMAND, f"run.dir={tmp_path / 'command'}", "mesh.shard=1", "launcher.workers=2"])
    pool.run(train_once, config, world=2)
    one, other = weights_of(tmp_path / "trainer"), weights_of(tmp_path / "command")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


Bad = Callable[[Path], object]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda p: trainer(p, DataParallel(Net())), "model is a DataParallel; hand over the module in it"),
        (lambda p: dtrain.Trainer(model=Net(), data=object()), "data is a object; a data set has len() and [i]"),  # type: ignore[arg-type]
        (lambda p: dtrain.Trainer(model=Net(), data=[]), "data has no example"),
        (lambda p: dtrain.Trainer(model=Net(), data=[1]), "data[0] is a int; it must be a dict of tensors"),  # type: ignore[list-item]
        (lambda p: dtrain.Trainer(validation=examples()), "validation is a data set, but data is none"),
        (lambda p: dtrain.Trainer(train={"steps": object()}), "and settings are text, numbers, lists and mappings"),
        (lambda p: trainer(p, Net(), train={"stepz": 3}).train(), "there is no key train.stepz; did you mean"),
        (lambda p: trainer(p, Net(), "launcher=mpi").train(), "a Trainer starts no processes; leave the launcher out"),
        (lambda p: trainer(p, Net(), "mesh.shard=2").train(), "the mesh is 1 replicas x 2 shards = 2 ranks"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_trained(made: Bad, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        made(tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_module_among_the_words_is_told_its_place() -> None:
    with pytest.raises(TypeError, match=r"a model is given by model="):
        dtrain.Trainer(Net())  # type: ignore[arg-type]


def test_a_run_of_an_object_is_built_by_nobody_else(tmp_path: Path) -> None:
    trainer(tmp_path, Net()).train()
    with pytest.raises(ConfigError, match=re.escape(f"was an object ({__name__}.Net) in a program: hand one over")):
        dtrain.load(tmp_path)
    other = trainer(tmp_path, Net())
    other._handed_data(examples(80, 5), examples(8, 2))
    with pytest.raises(ResumeError, match="the data have changed since"):
        other.train()
