"""`dtrain bench collectives`: its arithmetic, its table, and real ranks whose every value is checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.bench.fit import errors, fit, predict
from dtrain.bench.ops import OPS, bus_factor
from dtrain.bench.rows import Row, append, read, slower
from dtrain.bench.settings import Settings, parse
from dtrain.bench.table import line, summary
from dtrain.errors import ConfigError


def row(**how: object) -> Row:
    values: dict[str, object] = {
        "op": "all_reduce", "transport": "torch", "dtype": "float32", "world": 4, "bytes": 1000, "iterations": 3,
        "min_ms": 1.0, "p50_ms": 2.0, "p95_ms": 3.0, "p99_ms": 3.0, "max_ms": 3.0, "algbw_mbit": 60.0,
        "busbw_mbit": 93.0, "sent_bytes": 1530, "optimal_bytes": 1500, "link_mbit": 100.0, "slowest_rank": 2,
        "slowest_host": "c3", "wrong": 0, "cpu_busy": 0.1,
    }  # fmt: skip
    return Row(**{**values, **how})  # type: ignore[arg-type]  # names of its fields


@pytest.mark.parametrize(
    ("op", "world", "factor"),
    [("all_reduce", 4, 1.5), ("all_gather", 4, 0.75), ("reduce_scatter", 2, 0.5), ("all_to_all", 8, 0.875),
     ("broadcast", 4, 1.0), ("comm.all_reduce", 2, 1.0), ("comm.shift", 3, 1.0), ("all_reduce", 1, 0.0)],
)  # fmt: skip
def test_bus_factors_are_those_of_nccl_tests(op: str, world: int, factor: float) -> None:
    assert bus_factor(op, world) == pytest.approx(factor)


def test_a_sweep_has_the_largest_size_too() -> None:
    assert Settings(min_bytes=1000, max_bytes=5000, factor=2).sizes() == [1000, 2000, 4000, 5000]
    assert Settings(min_bytes=7, max_bytes=7).sizes() == [7]


def test_settings_are_read_and_the_other_words_kept() -> None:
    settings, others = parse(["bench.max_bytes=2M", "launcher=slurm", "bench.ops=all_reduce,comm.shift"], OPS)
    assert (settings.max_bytes, settings.ops, others) == (2_000_000, ("all_reduce", "comm.shift"), ["launcher=slurm"])


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("bench.max_byte=1", "did you mean bench.max_bytes?"),
        ("bench.ops=allreduce", "did you mean all_reduce?"),
        ("bench.max_bytes=big", "must be a number such as 4000 or 16M"),
        ("bench.max_bytes=1", "are no range"),
        ("bench.dtype=int7", "choose one of float32"),
        ("bench.transport=mpi", "carries the ops of comm"),
        ("bench.factor=1", "at least 2"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(word: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([word], OPS)
    assert words in str(error.value)


def test_the_fit_finds_the_link_that_made_the_figures_and_predicts_other_numbers_of_ranks() -> None:
    alpha, beta = 0.005, 8 / 50e6
    sizes = (4000, 100_000, 2_000_000, 4_000_000)
    found = fit("all_reduce", 2, {size: predict("all_reduce", 2, size, alpha, beta) for size in sizes})
    assert found.alpha == pytest.approx(alpha, rel=0.05) and found.beta == pytest.approx(beta) and found.usable
    measured = {size: predict("all_reduce", 4, size, alpha, beta) for size in sizes}
    assert max(map(abs, errors(found, 4, measured))) < 0.05


def test_a_sweep_that_is_no_line_is_not_called_a_fit() -> None:
    found = fit("all_reduce", 2, {1000: 0.1, 2000: 0.001, 3000: 0.5, 4000: 0.51})
    assert not found.usable
    with pytest.raises(ValueError, match="three sizes"):
        fit("all_reduce", 2, {1000: 0.1})


def test_rows_are_read_as_they_were_written_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for bytes_ in (1000, 2000):
        append(path, row(bytes=bytes_))
    with path.open("a") as file:
        file.write('{"op": "all')
    assert [found.bytes for found in read(path)] == [1000, 2000]


def test_the_table_tells_share_of_the_link_wrong_values_and_invalid_rows() -> None:
    text = line(row(wrong=3, invalid="the processor is the limit"))
    assert "93.0%" in text and "1.02" in text and "2@c3  INVALID: the processor is the limit" in text
    assert any("3 values were WRONG" in found for found in summary([row(wrong=3)]))
    assert any("rank 2 on c3 was the slowest in 6 of 6 rows" in found for found in summary([row()] * 6))


def test_what_became_slower_than_the_baseline_is_named() -> None:
    assert [times for _, times in slower([row(p50_ms=4.0), row(bytes=5)], [row()])] == [2.0]


@pytest.mark.processes
def test_every_op_is_right_between_real_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "bench", "collectives", "launcher.workers=3", f"bench.ops={','.join(OPS)}",
         "bench.min_bytes=600", "bench.max_bytes=60K", "bench.factor=100", "bench.iterations=2", "bench.warmup=1",
         f"run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, timeout=55, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path / "run" / "rows.jsonl")
    assert [(one.op, one.bytes) for one in found] == [(op, size) for op in OPS for size in (600, 60_000)]
    assert all(one.wrong == 0 and one.world == 3 and one.iterations == 2 for one in found)
