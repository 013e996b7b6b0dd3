"""Lightning's Trainer with a sync in it: one argument, and nothing is lost at a checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from dtrain import diloco, every_step, streaming_diloco
from dtrain.comm.collectives.two_phase import two_phase_bytes
from dtrain.comm.runtime.method import Sync
from dtrain.compress import cast, error_feedback, quantize
from dtrain.integrations._frameworks import require
from dtrain.integrations.lightning import EXCHANGED, SKIPPED, STEPS, ShardedSyncStrategy, SyncStrategy
from dtrain.testing import WorkerPool

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

INT8 = quantize(bits=8, block=16)
METHODS: dict[str, Sync] = {
    "dense": every_step(),
    "int8": every_step(compress=error_feedback(INT8)),
    "diloco": diloco(every_steps=4),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=2, layers_per_fragment=0),
}
STOP, END, EPOCH = 6, 11, 8
"""Steps: before the checkpoint, in all, and batches of an epoch."""


class Batches:
    """Of this rank, the same in every epoch. A trainer that is loaded goes on behind the batch that it was at."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(100 + dist.get_rank())
        x = torch.randn(EPOCH, 5, 7, generator=generator)
        self.batches = list(zip(x, x[..., :3].tanh(), strict=True))
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def judged() -> DataLoader[tuple[Tensor, ...]]:
    """A batch to evaluate with, the same on all ranks."""
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(7))
    return DataLoader(TensorDataset(x, x[:, :3].tanh()), batch_size=40)


class Module(LightningModule):  # type: ignore[misc]
    """``kind``: "one" optimizer with automatic optimization, or "two" with manual."""

    def __init__(self, kind: str = "one", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(7, 19), nn.Tanh(), nn.Linear(19, 3))
        self.automatic_optimization = kind == "one"
        self.losses: list[float] = []
        self.evaluated: dict[int, float] = {}
        self.poisoned = -1
        self.net.get_parameter("2.weight").register_hook(
            lambda grad: grad * float("nan") if dist.get_rank() == 1 and len(self.losses) == self.poisoned else grad
        )

    def loss(self, batch: Any) -> Tensor:
        error: Tensor = self.net(batch[0]) - batch[1]
        return error.square().mean()

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Any) -> None:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        self.evaluated[self.trainer.global_step] = float(loss)

    def test_step(self, batch: Any) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any) -> float:
        return float(self.loss(batch))

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return [AdamW(self.net[0].parameters(), lr=0.02), SGD(self.net[2].parameters(), lr=0.1, momentum=0.9)], []
        optimizer = AdamW(self.parameters(), lr=0.02)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 40), "interval": "step"}]


class Entries(Logger):  # type: ignore[misc]
    """What the trainer logs."""

    name, version = "entries", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append(value)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Watch(Callback):  # type: ignore[misc]
    """Keeps the strategy's sync, which is detached at the end, and the parameters in training by step."""

    def __init__(self) -> None:
        self.sync: Any = None
        self.live: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.sync = trainer.strategy.sync
        self.live[self.sync.steps] = weights(module)


@contextmanager
def launched() -> Iterator[None]:
    """As if torchrun had started this process."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    logging.getLogger("lightning").setLevel(logging.ERROR)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with mock.patch.dict(os.environ, {**variables, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}):
        yield


def made(strategy: Any, folder: str = "", stop: int = STOP, **arguments: Any) -> Trainer:
    """A trainer; with a ``folder`` it saves at step ``stop``."""
    settings: dict[str, Any] = {"max_steps": END, "max_epochs": -1, "log_every_n_steps": 1, "logger": False}
    if folder:
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
        settings["callbacks"] = [*arguments.pop("callbacks", []), saves]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    fixed = {"accelerator": "cpu", "devices": dist.get_world_size(), "use_distributed_sampler": False}
    settings |= {"enable_checkpointing": bool(folder), **quiet, **fixed, **arguments}
    return Trainer(strategy=strategy, **settings)


def weights(module: nn.Module) -> list[float]:
    parameters: list[Any] = [parameter.detach() for parameter in module.parameters()]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return torch.cat([p.reshape(-1) for p in whole]).tolist()


def digest(module: nn.Module) -> str:
    return hashlib.blake2b(repr(weights(module)).encode()).hexdigest()


def loss_of(state: dict[str, Tensor]) -> float:
    module = Module()
    module.load_state_dict(state)
    return evaluated(module)


@torch.no_grad()
def evaluated(module: Module) -> float:
    return float(module.loss(next(iter(judged()))))


def loss_of_saved(checkpoint: str | Path) -> float:
    return loss_of(torch.load(checkpoint, weights_only=False)["state_dict"])


# ---- resumed, bitwise ------------------------------------------------------------------------------------------------


def went_on(name: str, kind: str, folder: str, accumulate: int) -> dict[str, Any]:
    """What a run gives, and one that went on from its checkpoint in the middle of a round, in a new trainer."""
    each = 2 if kind == "two" else 1  # Lightning counts the steps of each optimizer
    found: dict[str, Any] = {}
    with launched():
        for part in ("whole", "again"):
            module, entries, watch = Module(kind, int(part == "again")), Entries(), Watch()
            trainer = made(
                SyncStrategy(METHODS[name]), folder if part == "whole" else "", each * STOP, max_steps=each * END,
                logger=entries, callbacks=[watch], val_check_interval=3 * accumulate, check_val_every_n_epoch=None,
                accumulate_grad_batches=accumulate, gradient_clip_val=0.5 if kind == "one" else None,
            )  # fmt: skip
            checkpoint = None if part == "whole" else Path(folder) / f"step={each * STOP}.ckpt"
            trainer.fit(module, Batches(), judged(), ckpt_path=checkpoint)
            assert trainer.strategy.sync is None and f"{END} steps, 0 skipped" in trainer.strategy.report
            assert trainer.global_step == each * END and watch.sync.steps == END
            found[part] = digest(module), module.losses, module.evaluated
            if part == "whole":
                found |= {"live": watch.live[STOP], "sent": entries.logged[EXCHANGED]}
                labels = {label for _, label, _ in watch.sync.meter.by if label.startswith("fragment")}
                found["messages"] = len(labels) or 1
                assert entries.logged[SKIPPED] == [0] * END
    return found


CASES = [*((name, "one", 1) for name in METHODS), ("int8", "one", 2), ("diloco", "one", 2)]


@pytest.mark.parametrize(("name", "kind", "accumulate"), [*CASES, ("int8", "two", 1), ("diloco", "two", 1)])
def test_it_goes_on_bitwise(pool: WorkerPool, name: str, kind: str, accumulate: int, tmp_path: Path) -> None:
    one, other = pool.run(went_on, name, kind, str(tmp_path), accumulate, world=2)
    for rank in (one, other):
        (end, losses, evaluated), (its_end, its_losses, its_evaluated) = rank["whole"], rank["again"]
        assert its_end == end and its_losses == losses[STOP * accumulate :]
        assert its_evaluated == {step: value for step, value in evaluated.items() if step in its_evaluated}
        assert losses[-1] < 0.7 * losses[0]
    assert one["whole"][0] == other["whole"][0]  # replicas are equal after the last round
    assert one["whole"][2] == other["whole"][2] and len(one["whole"][2]) == 4  # and where they evaluate
    assert (one["live"] != other["live"]) == (name in ("diloco", "streaming"))
    step = STOP * (2 if kind == "two" else 1)
    assert one["whole"][2][step] == pytest.approx(loss_of_saved(tmp_path / f"step={step}.ckpt"), abs=1e-7)
    assert one["sent"][-1] - one["sent"][0] == declared_bytes(name, one["messages"])


def declared_bytes(name: str, messages: int, parameters: tuple[int, ...] = (133, 19, 57, 3)) -> int:
    """Between the first step and the end: an exchange a step, or three rounds, two whole ones and a last one."""
    exchanges, weighted = (END - 1, False) if name in ("dense", "int8") else (3, True)
    one = two_phase_bytes(list(parameters), INT8 if name == "int8" else cast("fp32"), 2, weighted=weighted)
    empty = two_phase_bytes([], cast("fp32"), 2, weighted=weighted)
    save = 8  # whether all files were written
    return exchanges * (one + (messages - 1) * empty) + save


# ---- as data parallelism ---------------------------------------------------------------------------------------------


def dense_and_plain(kind: str) -> list[list[float]]:
    found = []
    for strategy in (DDPStrategy(), SyncStrategy(METHODS["dense"])):
        with launched():
            module = Module(kind)
            steps = 30 if kind == "one" else 60
            trainer = made(strategy, max_steps=steps, gradient_clip_val=0.5 if kind == "one" else None)
            trainer.fit(module, Batches())
            found.append(module.losses)
    return found


@pytest.mark.parametrize("kind", ["one", "two"])
def test_dense_is_lightnings_own_data_parallelism(pool: WorkerPool, kind: str) -> None:
    for plain, dense in pool.run(dense_and_plain, kind, world=2):
        assert len(plain) == 30 and dense == pytest.approx(plain, abs=1e-5)


# ---- what is judged, and what is kept --------------------------------------------------------------------------------


def best_of_epochs(folder: str) -> dict[str, Any]:
    """Trained for three epochs; the checkpoint with the highest loss is kept, which is the first."""
    with launched():
        module = Module()
        saves = ModelCheckpoint(folder, monitor="val_loss", mode="max", save_top_k=1, save_last=True)
        trainer = made(
            SyncStrategy(diloco(every_steps=5)), max_epochs=3, max_steps=-1, callbacks=[saves],
            enable_checkpointing=True,
        )  # fmt: skip
        trainer.fit(module, Batches(), judged())
        last, best = evaluated(module), loss_of_saved(saves.best_model_path)
        assert module.evaluated[3 * EPOCH] == pytest.approx(last, abs=1e-7)  # the round was closed before
        assert float(saves.best_model_score) == pytest.approx(best, abs=1e-7)
        score = {"last": last, "best": best, "path": Path(saves.best_model_path).name}
        score["tested"] = trainer.test(module, judged(), verbose=False)[0]["test_loss"]
        score["validated"] = trainer.validate(module, judged(), verbose=False)[0]["val_loss"]
        score["predicted"] = trainer.predict(module, judged())[0]
        score["best tested"] = trainer.test(module, judged(), ckpt_path="best", verbose=False)[0]["test_loss"]
        trainer.save_checkpoint(Path(folder) / "last.ckpt")  # of no round
        dist.barrier()
        return score


def test_the_best_model_is_chosen_at_the_outer_parameters_and_alone_keeps_its_files(
    pool: WorkerPool, tmp_path: Path
) -> None:
    one, other = pool.run(best_of_epochs, str(tmp_path), world=2)
    assert one == other and one["last"] < one["best"]
    assert [one[name] for name in ("tested", "validated", "predicted")] == pytest.approx([one["last"]] * 3, abs=1e-7)
    assert one["best tested"] == pytest.approx(one["best"], abs=1e-7)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last.ckpt", one["path"], f"{one['path']}.dtrain"}


def stopped_early_then_on(folder: str) -> tuple[float, list[str], str, list[int]]:
    """Stopped by a callback within a round, saved behind a link, gone on with, and fitted again."""
    with launched():
        module, strategy = Module(), SyncStrategy(diloco(every_steps=5))
        patience = EarlyStopping("val_loss", patience=0, mode="max")
        saves = ModelCheckpoint(folder, save_last="link")
        trainer = made(strategy, max_epochs=4, max_steps=-1, callbacks=[patience, saves], enable_checkpointing=True)
        trainer.fit(module, Batches(), judged())
        steps, digests = [trainer.global_step], [digest(module), strategy.report[:19]]
        for _ in range(2):
            module = Module()
            trainer = made(strategy := SyncStrategy(diloco(every_steps=5)), max_epochs=4, max_steps=-1)
            trainer.fit(module, Batches(), ckpt_path=str(Path(folder) / "last.ckpt"))
            steps.append(trainer.global_step)
            digests.append(digest(module))
        trainer.fit_loop.max_epochs = 5
        trainer.fit(module, Batches())
        return loss_of(module.state_dict()), digests, strategy.report, [*steps, trainer.global_step]


def test_a_run_that_was_stopped_closes_its_round_and_goes_on(pool: WorkerPool, tmp_path: Path) -> None:
    one, other = pool.run(stopped_early_then_on, str(tmp_path), world=2)
    loss, (_, first, again, once_more), report, steps = one
    assert (loss, one[1], steps) == (other[0], other[1], other[3]) and again == once_more
    assert first == "24 steps, 0 skipped" and steps == [24, 32, 32, 40] and report.startswith("8 steps")


def with_a_skipped_step(name: str, scale: bool) -> tuple[str, list[float], float | None]:
    with launched():
        module, entries = Module(), Entries()
        module.poisoned = 3
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = made(SyncStrategy(METHODS[name]), max_steps=6, logger=entries, plugins=[precision] if scale else None)
        trainer.fit(module, Batches())
        return digest(module), entries.logged[SKIPPED], precision.scaler.get_scale() if scale else None


@pytest.mark.parametrize(("name", "scale"), [("int8", False), ("int8", True), ("diloco", False)])
def test_a_skipped_step_is_logged(pool: WorkerPool, name: str, scale: bool) -> None:
    one, other = pool.run(with_a_skipped_step, name, scale, world=2)
    assert one[0] == other[0] and one[2] == other[2] == (512.0 if scale else None)
    assert other[1] == [0, 0, 1, 1, 1, 1] and one[1] == (other[1] if name == "int8" else [0] * 6)


# ---- what Lightning would send ---------------------------------------------------------------------------------------


def broadcasts() -> list[tuple[int, bool]]:
    """Collectives of Lightning's own in three steps without an exchange, and whether DDP broadcasts buffers."""
    found = []
    for strategy in (DDPStrategy(), SyncStrategy(METHODS["diloco"])):
        with launched():
            module = Module()
            module.register_buffer("seen", torch.zeros(1))
            trainer = made(strategy, max_steps=3, callbacks=[counted := Counted()])
            trainer.fit(module, Batches())
            found.append((counted.calls, counted.buffers))
    return found


class Counted(Callback):  # type: ignore[misc]
    """Calls of ``broadcast`` between the first batch and the last."""

    calls, buffers = 0, False

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.original, self.buffers = dist.broadcast, trainer.strategy.model.will_sync_module_buffers()
        dist.broadcast = self.broadcast

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.original(*args, **kwargs)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        dist.broadcast = self.original


def test_lightning_sends_nothing_of_its_own_in_a_batch(pool: WorkerPool) -> None:
    assert pool.run(broadcasts, world=2) == [[(3, True), (0, False)]] * 2


def told_to_stop() -> tuple[str, int]:
    """Each rank gets the signal at a step of its own; none waits for the other."""

    class Signalled(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1 + dist.get_rank():
                trainer._signal_connector._sigterm_notifier_fn(signal.SIGTERM, None)

    with launched():
        trainer = made(SyncStrategy(METHODS["diloco"]), callbacks=[Signalled()])
        try:
            trainer.fit(Module(), Batches())
        except SystemExit as stop:
            return type(stop).__name__, trainer.global_step
        return "nothing", trainer.global_step


def test_a_rank_that_is_told_to_stop_stops(pool: WorkerPool) -> None:
    assert pool.run(told_to_stop, world=2) == [("SIGTERMException", 1), ("SIGTERMException", 2)]


def told() -> list[str]:
    with launched(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saves = ModelCheckpoint("unused", train_time_interval=timedelta(hours=1))
        trainer = made(
            SyncStrategy(METHODS["diloco"]), max_steps=1, max_time="00:01:00:00", callbacks=[saves],
            enable_checkpointing=True,
        )  # fmt: skip
        trainer.fit(Module(), Batches())
        trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)
        return [str(w.message) for w in caught if "slow links" in str(w.message) or "a signal" in str(w.message)]


def test_what_remains_on_the_slow_links_and_what_is_not_saved_is_told(pool: WorkerPool) -> None:
    for texts in pool.run(told, world=2):
        assert len(texts) == 3 and "max_time" in "".join(texts) and "train_time_interval" in "".join(texts)
        assert "a signal asked Lightning to save and to requeue" in texts[-1]


# ---- what is refused -------------------------------------------------------------------------------------------------


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class OfAnother(Module):
    def configure_optimizers(self) -> Any:
        return SGD(Module().parameters(), lr=0.1)


def refused_at_once(kind: str, folder: str) -> str:
    strategy = SyncStrategy(METHODS["diloco"])
    module, arguments = Module(), dict[str, Any]()
    with launched():
        if kind == "on exception":
            arguments = {"callbacks": [ModelCheckpoint(folder, save_on_exception=True)], "enable_checkpointing": True}
        if kind == "exception":
            arguments = {"callbacks": [OnExceptionCheckpoint(folder)], "enable_checkpointing": True}
        if kind == "of another":
            module = OfAnother()
        if kind == "accumulates":
            arguments = {"accumulate_grad_batches": 1 + dist.get_rank()}
        if kind == "url":
            module.on_train_batch_end = lambda *_: module.trainer.save_checkpoint("s3://bucket/last.ckpt")
        return said(lambda: made(strategy, max_steps=2, **arguments).fit(module, Batches()))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("on exception", "ValueError: ModelCheckpoint saves when a rank fails"),
        ("exception", "ValueError: OnExceptionCheckpoint saves when a rank fails"),
        ("of another", "ValueError: 4 of the optimizer's 4 parameters are not the model's"),
        ("accumulates", "ValueError: ranks differ: accumulate_grad_batches is 1 on rank 0 and 2 on rank 1"),
        ("url", "ValueError: s3://bucket/last.ckpt is no path of a file system"),
    ],
)
def test_it_is_refused(pool: WorkerPool, kind: str, words: str, tmp_path: Path) -> None:
    for text in pool.run(refused_at_once, kind, str(tmp_path), world=2):
        assert text.startswith(words), text


def given_twice() -> str:
    with launched():
        strategy = SyncStrategy(METHODS["diloco"])
        made(strategy)
        try:
            made(strategy)
        except MisconfigurationException as error:
            return str(error)
        return ""


def test_lightning_refuses_a_strategy_that_another_trainer_has(pool: WorkerPool) -> None:
    assert all("through both strategy class" in text for text in pool.run(given_twice, world=2))


def test_what_is_no_method_and_no_number_of_replicas_is_refused() -> None:
    with pytest.raises(TypeError, match="sync is diloco itself; call it"):
        SyncStrategy(typing.cast(Sync, diloco))
    with pytest.raises(ValueError, match="replicas is 0; give a number of at least 1"):
        ShardedSyncStrategy(METHODS["diloco"], 0)


def resumed(kind: str, folder: str) -> tuple[str, list[float], float]:
    """What a trainer with DiLoCo is told by a checkpoint, or its losses; and the next loss of who saved it."""
    path = Path(folder) / f"step={STOP}.ckpt"
    with launched():
        before = {"plain": DDPStrategy(), "another": SyncStrategy(METHODS["int8"])}
        module = Module()
        made(before.get(kind.partition(",")[0], SyncStrategy(METHODS["diloco"])), folder).fit(module, Batches())
        dist.barrier()
        if dist.get_rank() == 1 and kind == "a rank's is missing":
            (Path(f"{path}.dtrain") / "replica-1-of-2.shard-0-of-1.safetensors").unlink()
        if dist.get_rank() == 0 and kind == "not together":
            saved = torch.load(path, weights_only=False)
            torch.save(saved | {STEPS: STOP - 1}, path)
        dist.barrier()
        again = Module(seed=1)
        trainer = made(SyncStrategy(METHODS["diloco"], begin_anew=kind.endswith(", anew")))
        text = said(lambda: trainer.fit(again, Batches(), ckpt_path=path))
        return text, again.losses, module.losses[STOP]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plain", ["FileNotFoundError: "] * 2),
        ("a rank's is missing", ["RuntimeError: the part of replicas [1] was not read", "FileNotFoundError: "]),
        ("another", ["ValueError: this state was saved with"] * 2),
        ("not together", ["ValueError: "] * 2),
        ("plain, anew", ["nothing"] * 2),
    ],
)
def test_a_checkpoint_that_does_not_fit(pool: WorkerPool, kind: str, words: list[str], tmp_path: Path) -> None:
    for (text, losses, expected), start in zip(pool.run(resumed, kind, str(tmp_path), world=2), words, strict=True):
        assert text.startswith(start), text
        assert ("begin_anew=True)" in text) == (kind == "plain")
        assert ("they were not saved together" in text) == (kind == "not together")
        assert len(losses) == (END - STOP if kind == "plain, anew" else 0)
        assert not losses or losses[0] == pytest.approx(expected, abs=1e-6)


def test_a_version_that_was_not_tested_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.5.1")
    with pytest.warns(RuntimeWarning, match=r"tested with lightning 2\.6, and this is 2\.5\.1: it is tried"):
        require("lightning")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", mock.Mock(side_effect=PackageNotFoundError))
    with pytest.raises(ImportError, match="needs lightning, which is not installed: pip install lightning"):
        require("lightning")
