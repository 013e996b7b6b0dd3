"""`dtrain bench train`: syncs in training, timed in turn beside training without communication."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.bench import train_rows
from dtrain.bench.rows import append, read_as
from dtrain.bench.train_page import page
from dtrain.bench.train_rows import TrainRow, interval, summary, tied
from dtrain.bench.train_settings import TrainSettings, parse, words_of_sync
from dtrain.cli.main import main
from dtrain.errors import ConfigError
from dtrain.report import summary as of_runs
from dtrain.train.results import dense_bytes

ROW = TrainRow(
    sync="dense", engine="ddp", replicas=2, shards=1, block_steps=10, seconds=[0.2] * 9, alone_seconds=[0.1] * 9,
    again_seconds=[0.1] * 9, exposed_seconds=0.05, sent_bytes=4_000_000, dense_bytes=4_000_000, cpu_busy=0.5,
    cpu_foreign=0.0,
)  # fmt: skip


def row(sync: str, *times: float, **changes: object) -> TrainRow:
    seconds = [0.1 * times for times in times]
    given = {"sync": sync, "seconds": seconds, **{name: [0.1] * len(times) for name in ("alone_seconds",)}, **changes}
    given.setdefault("again_seconds", given["alone_seconds"])
    return dataclasses.replace(ROW, **given)  # type: ignore[arg-type]  # names of its fields


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_syncs_are_timed_and_trained_between_real_ranks(tmp_path: Path) -> None:
    words = (
        "launcher.workers=2", "engine=ddp", "mesh.replicate=2", "mesh.shard=1", "model.dim=32", "model.layers=1",
        "data.block=32", "train.batch_size=8", "bench.rounds=2", "bench.block_steps=3", "bench.steps=10",
        "train.evaluation_examples=8", "bench.syncs=int8_ef,diloco/2:int8", f"run.dir={tmp_path}",
    )  # fmt: skip
    command = [sys.executable, "-m", "dtrain", "bench", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    compressed, local = read_as(tmp_path / "rows.jsonl", TrainRow)
    assert (compressed.sync, compressed.block_steps) == ("int8_ef", 3)
    assert (local.sync, local.block_steps) == ("diloco/2:int8", 4)
    runs = [of_runs.read(tmp_path / name / "summary.json") for name in ("00-int8_ef", "01-diloco-2-int8")]
    for measured, run in zip((compressed, local), runs, strict=True):
        assert len(measured.times) == 2 and min(measured.seconds) > 0
        assert measured.evaluated_at == list(range(11)) and measured.losses[-1] == run.validation_loss
        assert measured.dense_bytes == run.dense_bytes_per_rank // run.steps
    assert compressed.dense_bytes / compressed.sent_bytes > 3 and local.sent_bytes < compressed.sent_bytes
    assert "validation loss after 10 steps" in done.stdout


@pytest.mark.parametrize("number", range(1, 30))
def test_an_interval_misses_the_median_in_a_twentieth_of_all_cases_at_most(number: int) -> None:
    import math

    low, high = interval([float(value) for value in range(number)])
    outside = int(low)
    assert low == number - 1 - high
    missed = 2 * sum(math.comb(number, count) for count in range(outside + 1)) / 2**number
    assert missed <= 0.05 or outside == 0
    one_more = 2 * sum(math.comb(number, count) for count in range(outside + 2)) / 2**number
    assert one_more > 0.05 or outside + 1 >= number / 2


def test_there_is_no_winner_inside_the_noise() -> None:
    fast, close, slow = row("a", *[1.10] * 9), row("b", *[1.101] * 9), row("c", *[1.5] * 9)
    assert [tie.sync for tie in tied([slow, close, fast])] == ["a", "b"]
    assert "no winner inside the noise: a, b" in "\n".join(summary([slow, close, fast]))
    assert "fastest: a" in summary([fast, slow])
    wide = row("d", 1.0, 1.0, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6)
    assert [tie.sync for tie in tied([fast, wide])] == ["a", "d"]  # whose interval begins at 1.0
    noisy = row("e", *[1.2] * 9, again_seconds=[0.12] * 9)
    assert noisy.noise == pytest.approx(0.2) and len(tied([noisy, row("f", *[1.3] * 9)])) == 2


def test_a_step_is_held_to_one_without_communication_before_and_after_it() -> None:
    drifting = row("a", 2.0, 4.0, 8.0, alone_seconds=[0.1, 0.2, 0.4], again_seconds=[0.1, 0.2, 0.4])
    assert drifting.times == pytest.approx([2.0, 2.0, 2.0]) and drifting.utilization == pytest.approx(0.5)


def test_losses_are_told_at_equal_tokens_at_equal_time_and_as_time_to_a_loss(tmp_path: Path) -> None:
    losses = {"evaluated_at": [0, 10, 20]}
    slow = row("slow", *[2.0] * 9, losses=[4.0, 2.0, 1.0], **losses)  # 4 s
    fast = row("fast", *[1.0] * 9, losses=[4.0, 3.0, 2.0], **losses)  # 2 s
    text = summary([slow, fast])
    assert text[-2].split() == ["slow", "1.0000", "2.0000", "4.0", "s"]
    assert text[-1].split() == ["fast", "2.0000", "2.0000", "never"]
    assert summary([slow, fast], loss=3.0)[-1].split() == ["fast", "2.0000", "2.0000", "1.0", "s"]
    assert len(train_rows.line(fast, [])) == len(train_rows.HEAD)
    append(tmp_path / "rows.jsonl", fast)
    assert read_as(tmp_path / "rows.jsonl", TrainRow) == [fast]


def test_the_page_has_a_plot_of_times_of_bytes_and_of_losses(tmp_path: Path) -> None:
    rows = [row("a", *[1.1] * 9, evaluated_at=[0, 10], losses=[4.0, 2.0]), row("b", *[1.5] * 9)]
    made = page("runs/x", rows, summary(rows))
    titles = [getattr(part, "title", "") for part in made.parts]
    losses = ["Loss after equal tokens", "Loss after equal time"]
    assert titles[1:] == ["Time of a step", "Sent", *losses, "Rows"]
    empty = page("runs/x", [], summary([])).table
    assert empty is not None and not empty.rows


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("bench.round=3", "did you mean bench.rounds?"),
        ("bench.rounds=0", "bench.rounds must be at least 1, but is 0"),
        ("bench.rounds=many", "bench.rounds must be a number such as 20, but is 'many'"),
        ("bench.syncs=", "bench.syncs names none"),
        ("bench.syncs=dense,dense", "names one twice"),
        ("bench.syncs=dilco", "did you mean diloco?"),
        ("bench.syncs=diloco/ten", "'diloco/ten' is no sync"),
        ("bench.syncs=diloco:int9", "did you mean int8?"),
        ("bench.loss=2", "set bench.steps, too"),
        ("bench.steps", "bench.steps has no value"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_the_way_out(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        parse([word])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sync=diloco"], "bench train sets sync itself, for each of bench.syncs"),
        (["sync.every_steps=5"], "bench train sets sync.every_steps itself"),
        (["train.steps=5"], "bench train sets train.steps itself"),
        (["bench.syncs=dense,dgc"], "dgc: "),  # which needs plain SGD
        (["mesh.replicate=3"], "dense: "),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "train", f"run.dir={tmp_path / 'run'}", "launcher.workers=4", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "rows.jsonl").exists() and not (tmp_path / "run" / "bench.json").exists()


def test_settings_come_back_and_words_of_training_are_left() -> None:
    settings, others = parse(["bench.syncs=[dense, diloco]", "bench.loss=1.5", "bench.steps=9", "optim=muon"])
    assert settings == TrainSettings(syncs=("dense", "diloco"), loss=1.5, steps=9) and others == ["optim=muon"]
    assert words_of_sync("bf16") == ("sync=every_step", "compress=bf16")
    assert dense_bytes(1000, 2, 1) == 4000
