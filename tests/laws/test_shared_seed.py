"""Shared randomness on every engine: forward passes only, one to the bit on all ranks, resumed, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtrain.cli.main import main
from dtrain.comm.layout import Segment
from dtrain.comm.shared_seed.digest import partial, unsigned
from dtrain.comm.shared_seed.update_log import read
from dtrain.testing import WorkerPool
from tests.laws.jobs import ENGINES, Finished, run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

Kept = Callable[[str], Finished]

CHOSEN = ["optim=sgd", "optim.inner.momentum=0", "optim.inner.lr=0.002", "sync.samples=2", "train.steps=6"]


@pytest.fixture(scope="module")
def whole_run(pool: WorkerPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A run of one byte a step on an engine, in one go; its log is beside its folder."""
    done: dict[str, Finished] = {}

    def get(engine: str) -> Finished:
        if engine not in done:
            folder = tmp_path_factory.mktemp(f"{engine}-one_byte")
            log = f"sync.log={folder / 'log'}"
            done[engine] = run(pool, folder / "run", text, engine, "one_byte", *CHOSEN, log)
        return done[engine]

    return get


@pytest.mark.parametrize("engine", ENGINES)
def test_a_byte_is_enough_on_every_engine(
    pool: WorkerPool, text: Path, tmp_path: Path, whole_run: Kept, engine: str
) -> None:
    """With clipping, warm-up and weight decay as they come; a stop leaves no trace, in the log neither."""
    whole = whole_run(engine)
    run(pool, tmp_path / "half", text, engine, "one_byte", *CHOSEN, f"sync.log={tmp_path / 'half-log'}",
        "train.stop_after_steps=4")  # fmt: skip
    again = run(pool, tmp_path / "half", text, engine, "one_byte", *CHOSEN, f"sync.log={tmp_path / 'half-log'}")
    assert again.losses == whole.losses
    assert again.digest == whole.digest
    folders = (whole.folder.parent / "log", tmp_path / "half-log")
    logs = [(folder / f"replica-{n}.log").read_bytes() for folder in folders for n in (0, 1)]
    assert logs == 4 * logs[:1]
    records = read(folders[0] / "replica-0.log").records
    assert len(records) == 6 and len({record.digest for record in records}) == 6


def test_a_run_that_begins_again_keeps_the_log_of_before(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    """As after a death before the first checkpoint."""
    log = tmp_path / "log"
    done = [run(pool, tmp_path / n, text, "ddp", "one_byte", *CHOSEN, f"sync.log={log}") for n in ("once", "again")]
    assert done[0].digest == done[1].digest
    assert (log / "replica-1.log").read_bytes() == (log / "replica-1.log.1").read_bytes()


def test_more_replicas_go_on_with_logs_of_their_own(
    pool: WorkerPool, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [*CHOSEN, f"sync.log={tmp_path / 'log'}"]
    run(pool, tmp_path / "run", text, "ddp", "one_byte", *chosen, "train.stop_after_steps=4")
    done = run(pool, tmp_path / "run", text, "ddp", "one_byte", *chosen, mesh=(4, 1))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000000004"
    assert checkpoint.is_dir()
    for replica in (0, 3):
        out = tmp_path / f"replayed-{replica}"
        words = [str(tmp_path / "log" / f"replica-{replica}.log"), "--weights", str(checkpoint), "--out", str(out)]
        assert main(["log", "replay", *words]) == 0
        assert done.digest in capsys.readouterr().out
    assert main(["log", "info", str(tmp_path / "log" / "replica-0.log")]) == 0
    assert "from step 4: machines 0, 1, 2, 3" in capsys.readouterr().out
    assert main(["log", "info", str(tmp_path / "log")]) == 1
    assert "is a folder; give one of its logs (replica-0.log, replica-1.log" in capsys.readouterr().err


OTHERS = {
    "fedkseed": ("optim=sgd", "optim.inner.momentum=0", "optim.inner.lr=0.0005", "optim.schedule=constant",
                 "optim.warmup_steps=0", "sync.every_steps=4", "sync.directions=64"),
    "ferret": ("sync.every_steps=4", "sync.directions=4096", "sync.block=4096"),
}  # fmt: skip


@pytest.mark.parametrize("sync", OTHERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_others_train_on_every_engine_too(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str, sync: str
) -> None:
    """A stop within a round leaves no trace."""
    chosen = [*OTHERS[sync], "train.steps=10"]
    whole = run(pool, tmp_path / "whole", text, engine, sync, *chosen)
    run(pool, tmp_path / "half", text, engine, sync, *chosen, "train.stop_after_steps=6")
    again = run(pool, tmp_path / "half", text, engine, sync, *chosen)
    assert again.losses == whole.losses
    assert again.digest == whole.digest


def test_all_engines_find_much_the_same(whole_run: Kept) -> None:
    """Round-off may change a byte, so not to the bit: the loss after six steps."""
    ended = [whole_run(engine).losses[6] for engine in ENGINES]
    assert ended == pytest.approx(len(ENGINES) * ended[:1], rel=2e-2)


def test_what_was_trained_with_gradients_is_tuned_with_bytes(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    trained = run(pool, tmp_path / "dense", text, "fsdp", "dense", "train.steps=20")
    for engine in ("ddp", "zero3"):
        tuned = run(pool, tmp_path / engine, text, engine, "one_byte", *CHOSEN, f"sync.log={tmp_path / engine}",
                    f"run.weights={tmp_path / 'dense'}")  # fmt: skip
        begun = load_file(tmp_path / "dense" / "export" / "model.safetensors")
        values = {fqn: tensor.view(-1) for fqn, tensor in begun.items()}
        segments = {fqn: Segment(fqn, 0, value.numel()) for fqn, value in values.items()}
        log = read(tmp_path / engine / "replica-0.log")
        assert log.header.first == unsigned(partial(values, segments))
        assert tuned.losses[1] < trained.losses[2] and int(tuned.summary["sent_bytes_per_rank"]) < 1000


def test_a_log_is_told_verified_and_replayed(
    pool: WorkerPool, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(pool, tmp_path / "run", text, "fsdp", "one_byte", *CHOSEN, f"sync.log={tmp_path}",
               "train.checkpoint_every_steps=4", "train.keep_checkpoints=9")  # fmt: skip
    log, kept = str(tmp_path / "replica-1.log"), tmp_path / "run" / "checkpoints"

    def said(*words: str, code: int = 0) -> str:
        assert main(["log", *words]) == code
        told = capsys.readouterr()
        return told.err if code else told.out

    assert "steps 0 to 5: 6 records, 24 bytes of" in said("info", log)
    assert "from step 0: machines 0, 1" in said("info", log)
    early = ["--weights", str(kept / "step-0000000004")]
    assert "steps 4 to 6: replayed, every digest as in the log" in said("verify", log, *early)
    out = tmp_path / "made" / "last.safetensors"
    assert done.digest in said("replay", log, *early, "--out", str(out))
    assert "name another file" in said("replay", log, *early, "--out", str(out), code=1)
    assert "steps 4 to 5" in said("replay", log, *early, "--steps", "5", "--out", str(tmp_path / "at-5"))
    assert "steps 5 to 6" in said("verify", log, "--weights", str(tmp_path / "at-5"))

    content = bytearray((tmp_path / "replica-1.log").read_bytes())
    (tmp_path / "torn").write_bytes(content[:-3])
    assert "bytes of a record that a crash tore off follow" in said("info", str(tmp_path / "torn"))
    content[-20] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    assert "record 5, at byte" in said("verify", str(tmp_path / "damaged"), code=1)
    save_file({"w": torch.zeros(2)}, tmp_path / "other")
    assert "weights of another model" in said("verify", log, "--weights", str(tmp_path / "other"), code=1)
    wrong = load_file(out)
    next(iter(wrong.values())).view(-1)[0] += 1
    save_file(wrong, tmp_path / "wrong")
    assert "the log knows no weights" in said("verify", log, "--weights", str(tmp_path / "wrong"), code=1)
    assert "cannot be read as safetensors" in said("verify", log, "--weights", log, code=1)
    assert "No such file" in said("info", str(tmp_path / "nothing"), code=1)
