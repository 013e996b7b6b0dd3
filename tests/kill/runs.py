"""The runs that are disturbed: every sync that `dtrain train` has, on every engine, and replicas that come and go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.train import engine_registry
from tests.kill.harness import Attempts, Rank, digest, training_rank, until_ended
from tests.kill.members_job import REPLICAS, member_rank
from tests.sync_words import sync_words

ENGINES = engine_registry.names()
STEPS = 60
MEMBERS = "members"
ROUNDS = ("sync.every_steps=6",)
SGD = ("optim=sgd", "optim.inner.momentum=0", "optim.inner.lr=0.02")
CONSTANT = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.inner.weight_decay=0")
SYNCS: dict[str, tuple[str, ...]] = {
    "dense": (), "bf16": (), "int8": (), "int8_ef": (), "int4_ef": (), "int2_ef": (), "sign_ef": (), "topk_ef": (),
    "powersgd_ef": (),
    "dgc": (*SGD, "sync.warmup_steps=10"),
    "onebit_adam": ("sync.warmup_steps=12",),
    "local_sgd": ROUNDS, "slowmo": ROUNDS, "diloco": ROUNDS, "delayed_diloco": ROUNDS, "eager_diloco": ROUNDS,
    "co2": ROUNDS, "post_local_sgd": (*ROUNDS, "sync.warmup_steps=9"),
    "muloco": (*ROUNDS, "optim=muon"),
    "streaming_diloco": ("sync.every_steps=8", "sync.overlap_steps=2"),
    "fedavg_m": (*ROUNDS, *SGD), "scaffold_m": (*ROUNDS, *SGD),
    "sparta": ("sync.density=0.05",),
    "ferret": (*ROUNDS, "sync.directions=64"),
    "fedkseed": (*SGD, *CONSTANT, "sync.every_steps=4", "sync.directions=64"),
    "one_byte": (*SGD, *CONSTANT, "optim.inner.lr=0.001"),
}  # fmt: skip
"""What each needs beside its own configuration in a run as short as this."""

SMALL = (
    "data=custom", "data._target_=tests.kill.slow_text.SlowText", "data.block=16", "model.dim=16", "model.layers=2",
    "model.heads=2", f"train.steps={STEPS}", "train.batch_size=4", "train.evaluation_examples=0",
    "train.checkpoint_every_steps=5", "train.log_every_steps=5", "train.agree_every_steps=2",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """An engine, a sync and a mesh; the sync "members" is `tests.kill.members_job`, on DDP."""

    engine: str
    sync: str
    replicas: int = 2
    shards: int = 1

    @property
    def world(self) -> int:
        return self.replicas * self.shards

    def __str__(self) -> str:
        return f"{self.engine} {self.sync} {self.replicas}x{self.shards}"

    def rank(self, folder: Path, text: Path) -> Rank:
        """What each rank of it does."""
        return member_rank(folder) if self.sync == MEMBERS else training_rank(overrides(folder, self, text))


@dataclass(frozen=True)
class Result:
    """One disturbed run beside the undisturbed one of the same setting."""

    setting: Setting
    attempts: Attempts
    equal: bool


def overrides(folder: Path, setting: Setting, text: Path) -> list[str]:
    """The command line of a run of `dtrain train`."""
    more = [f"sync.log={folder}/log"] if setting.sync == "one_byte" else []
    return [
        f"run.dir={folder}", f"engine={setting.engine}", *sync_words(setting.sync), *SYNCS[setting.sync], *more,
        f"mesh.replicate={setting.replicas}", f"mesh.shard={setting.shards}", f"launcher.workers={setting.world}",
        f"data.path={text}", *SMALL,
    ]  # fmt: skip


def write_text(folder: Path) -> Path:
    """A text to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(4):
        words = " ".join(rng.choice(("one", "two", "three", "four", "five")) for _ in range(800))
        (folder / f"{number}.txt").write_text(words)
    return folder


def undisturbed(folder: Path, setting: Setting, text: Path) -> str:
    """The digest that all other runs of ``setting`` must end with. Raises ``RuntimeError`` if it does not end."""
    attempts = until_ended(setting.rank(folder, text), setting.world, folder, random.Random(0), disturbances=0)
    if len(attempts.history) != 1 or not attempts.ended:
        log = (folder / "rank-0.out").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{setting}: the undisturbed run failed: {attempts.history}\n{log}")
    return digest(folder)


def disturbed(folder: Path, setting: Setting, text: Path, *, expected: str, seed: str, count: int) -> Result:
    """The same setting, disturbed up to ``count`` times."""
    attempts = until_ended(
        setting.rank(folder, text), setting.world, folder, random.Random(seed), disturbances=count
    )  # fmt: skip
    return Result(setting, attempts, attempts.ended and digest(folder) == expected)


def plan(runs: int) -> Sequence[Setting]:
    """The settings of so many runs: every sync in turn, each time on the next engine; every tenth is 2 x 2."""
    names, picked = [*SYNCS, MEMBERS], []
    for number in range(runs):
        turn, place = divmod(number, len(names))
        if names[place] == MEMBERS:
            picked.append(Setting("ddp", MEMBERS, REPLICAS))
        else:
            picked.append(
                Setting(ENGINES[(place + turn) % len(ENGINES)], names[place], 2, 2 if number % 10 == 9 else 1)
            )
    return picked
