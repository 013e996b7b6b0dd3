"""`dtrain bench collectives` without processes: settings, values, rows, loads, and the table of a sweep."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import ClassVar, cast

import pytest
import torch

from dtrain.bench.load import Load, Watch, of_machines, why_invalid
from dtrain.bench.measure import RankReport, percentile, row
from dtrain.bench.ops import COMM, GROUPS, NATIVE, OPS, SENTINEL, Values, bus_factor, prepare
from dtrain.bench.rows import Row, append, compare, read, slower
from dtrain.bench.settings import DTYPES, FILE, Settings, link_mbit, parse
from dtrain.bench.table import HEAD, compared, line, report, summary
from dtrain.cli.bench_rows import Shown, show_rows
from dtrain.comm.channel import Channel
from dtrain.comm.ops import Place
from dtrain.errors import ConfigError
from dtrain.launchers.job import Job
from tests.bench.samples import ROW, sample

GOLDEN = Path(__file__).with_name("golden") / "table.txt"

# ---- settings ------------------------------------------------------------------------------------------------------


def test_a_sweep_has_the_largest_size_too() -> None:
    assert Settings(min_bytes=1000, max_bytes=5000, factor=2).sizes() == [1000, 2000, 4000, 5000]
    assert Settings(min_bytes=7, max_bytes=7).sizes() == [7]


def test_settings_are_read_and_the_other_words_kept() -> None:
    words = ["bench.max_bytes=2M", "launcher=slurm", "bench.ops=[all_reduce,comm.shift]", "bench.seconds=0.5"]
    settings, others = parse(words, GROUPS)
    assert (settings.max_bytes, settings.ops, settings.seconds) == (2_000_000, ("all_reduce", "comm.shift"), 0.5)
    assert others == ["launcher=slurm"]


def test_groups_of_ops_stand_for_their_ops() -> None:
    assert parse([], GROUPS)[0].ops == parse(["bench.ops=all"], GROUPS)[0].ops == OPS == (*NATIVE, *COMM)
    assert parse(["bench.ops=comm,all_reduce"], GROUPS)[0].ops == (*COMM, "all_reduce")
    assert parse(["bench.ops=native"], GROUPS)[0].ops == NATIVE


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("bench.max_byte=1", "did you mean bench.max_bytes?"),
        ("bench.ops=allreduce", "did you mean all_reduce?"),
        ("bench.ops=", "there is nothing called"),
        ("bench.max_bytes=big", "must be a number such as 4000 or 16M"),
        ("bench.max_bytes", "has no value; write bench.max_bytes=16000000"),
        ("bench.iterations=2.5", "must be a number such as 20"),
        ("bench.warmup=-1", "must be a number"),
        ("bench.max_bytes=1", "are no range"),
        ("bench.dtype=int7", "choose one of float32"),
        ("bench.transport=udp", "choose one of auto, torch, mpi"),
        ("bench.link=fast", "write 100mbit or 1gbit"),
        ("bench.factor=1", "at least 2"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(word: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([word], GROUPS)
    assert words in str(error.value)


def test_settings_reach_the_ranks_as_they_were(tmp_path: Path) -> None:
    settings = Settings(ops=("all_reduce", "comm.shift"), seconds=0.5, link="1gbit")
    settings.write(tmp_path / "run")
    assert Settings.read(tmp_path / "run" / FILE) == settings


@pytest.mark.parametrize(("text", "rate"), [("100mbit", 100), ("2.5gbit", 2500), ("64kbit", 0.064), ("none", 0)])
def test_rates_of_links(text: str, rate: float) -> None:
    assert link_mbit(text) == pytest.approx(rate)


# ---- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "world", "factor"),
    [("all_reduce", 4, 1.5), ("all_gather", 4, 0.75), ("reduce_scatter", 2, 0.5), ("all_to_all", 8, 0.875),
     ("broadcast", 4, 1.0), ("comm.all_reduce", 2, 1.0), ("comm.shift", 3, 1.0), ("all_reduce", 1, 0.0)],
)  # fmt: skip
def test_bus_factors_are_those_of_nccl_tests(op: str, world: int, factor: float) -> None:
    assert bus_factor(op, world) == pytest.approx(factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3, 7, 130, 300])
def test_sums_are_exact_in_every_dtype_whatever_the_number_of_ranks(dtype: str, world: int) -> None:
    values = Values(world, getattr(torch, dtype), torch.device("cpu"))
    added = torch.zeros(50, dtype=getattr(torch, dtype))
    for rank in range(world):
        added += values.addend(rank, 50)
    assert torch.equal(added, values.total(50)) and torch.equal(added[13:], values.total(37, start=13))


def test_what_is_moved_tells_who_sent_it_and_from_where() -> None:
    values = Values(8, torch.uint8, torch.device("cpu"))
    sent = [values.moved(rank, 300) for rank in range(8)]
    assert all(int((one != other).sum()) == 300 for one in sent for other in sent if one is not other)
    assert torch.equal(sent[3][20:], values.moved(3, 280, start=20))
    assert int((sent[3][1:] == sent[3][:-1]).sum()) == 0
    assert all(int(one.max()) < SENTINEL and int(one.min()) > 0 for one in sent)


@pytest.mark.parametrize(("op", "wrong"), [("all_gather", 100), ("all_to_all", 100), ("reduce_scatter", 50)])
def test_values_that_never_arrived_are_counted(op: str, wrong: int) -> None:
    class Two:
        """All that is asked of a channel before an op runs."""

        places: ClassVar = {"replicate": Place(1, 2)}

    case = prepare(op, 403, torch.float32, cast(Channel, Two()), torch.device("cpu"))
    case.reset()
    assert case.bytes == 400 and case.wrong() == wrong


# ---- rows ----------------------------------------------------------------------------------------------------------


def told(*seconds: float, host: str = "c1", sent: int = 0, wrong: int = 0, load: Load | None = None) -> RankReport:
    return RankReport(list(seconds), "eth0", sent, wrong, load or Load(host, 0.1, 0.1, 0.1), host)


def test_the_time_of_an_iteration_is_that_of_its_slowest_rank() -> None:
    made = row(
        "all_reduce", "gloo", Settings(link="100mbit"), 1_000_000,
        [told(0.100, 0.200, 0.300, sent=1_010_000), told(0.150, 0.100, 0.200, host="c2"),
         told(0.300, 0.300, 0.300, host="c3", wrong=2)],
    )  # fmt: skip
    assert (made.min_ms, made.p50_ms, made.max_ms) == pytest.approx((300, 300, 300))
    assert (made.slowest_rank, made.slowest_host) == (2, "c3") and made.slowest_by == pytest.approx(0.5)
    assert made.algbw_mbit == pytest.approx(8 / 0.3) and made.busbw_mbit == pytest.approx(8 / 0.3 * 4 / 3)
    assert made.of_link == pytest.approx(0.3556, abs=1e-4)
    assert (made.sent_bytes, made.optimal_bytes, made.wrong, made.iterations) == (1_010_000, 1_333_333, 2, 3)


def test_percentiles_are_values_that_were_measured() -> None:
    hundred = [float(value) for value in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.95) == 7


def test_rows_are_read_as_they_were_written_and_a_torn_last_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read(path) == []
    written = [sample(bytes=1000), sample(bytes=2000)]
    for one in written:
        append(path, one)
    with path.open("a") as file:
        file.write('{"op": "all')
    assert read(path) == written


def test_a_file_that_holds_something_else_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, ROW)
    path.write_text(path.read_text() + '{"op": "all_reduce"}\n')
    with pytest.raises(ValueError, match="line 2 is no row"):
        read(path)


def test_what_became_slower_than_the_baseline_is_named() -> None:
    now = [sample(p50_ms=250.0), sample(bytes=5), sample(backend="mpi", p50_ms=1e6)]
    assert [times for _, times in slower(now, [ROW])] == [2.0] == [times for _, times in compare(now, [ROW])]
    assert any(
        "slower than the baseline: all_reduce of 1,000,000 bytes takes 2.00" in text for text in compared(now, [ROW])
    )
    assert compared([sample(p50_ms=126.0)], [ROW]) == [
        "all 1 rows that the baseline has too are within a factor of 1.25"
    ]
    assert "the baseline has none of these rows" in compared(now[1:], [ROW])[0]


# ---- loads ---------------------------------------------------------------------------------------------------------


def test_what_others_than_our_ranks_do_on_a_machine_is_foreign() -> None:
    ours = [Load("a", 0.95, 0.9, 0.4), Load("a", 0.95, 0.92, 0.45)]
    assert of_machines(ours) == pytest.approx((0.95, 0.07))
    assert of_machines([*ours, Load("b", 0.5, 0.5, 0.1)]) == pytest.approx((0.95, 0.4))
    assert of_machines([Load("a", 0.5, 0.3, 0.4)])[1] == 0  # interrupts count as the process that they stop


def test_rows_are_invalid_where_not_the_link_was_measured() -> None:
    assert why_invalid(0.95, 0.05, 0.96) == "" == why_invalid(0.5, 0.05, 0.2)
    assert why_invalid(0.95, 0.05, 0.0) == ""  # nobody knows what the link can do
    assert "the processors were the limit: 95 % busy at 40 % of the link" in why_invalid(0.95, 0.0, 0.4)
    assert "other programs took 11 %" in why_invalid(0.2, 0.11, 0.99)


def test_this_process_sees_its_own_work() -> None:
    watch = Watch()
    began = watch.look()
    while watch.look() - began < 0.6:
        sum(range(1000))
    load = watch.since(began)
    assert load.machine and 0 < load.ours <= 1 and 0 < load.worked <= load.busy <= 1


# ---- the table -----------------------------------------------------------------------------------------------------

SWEEP = (
    sample(bytes=4000, iterations=100, min_ms=59.9, p50_ms=60.5, p95_ms=61, p99_ms=64, max_ms=66, algbw_mbit=0.53,
         busbw_mbit=0.79, sent_bytes=6900, optimal_bytes=6000),
    sample(bytes=100_000, p50_ms=72.0, busbw_mbit=16.7, sent_bytes=153_000, optimal_bytes=150_000),
    sample(p50_ms=180.0, busbw_mbit=66.7),
    sample(bytes=4_000_000, p50_ms=540.0, busbw_mbit=88.9, sent_bytes=6_030_000, optimal_bytes=6_000_000),
    sample(op="reduce_scatter", sent_bytes=1_502_000, optimal_bytes=750_000, slowest_by=0.31),
    sample(op="comm.shift", backend="mpi", wrong=3, invalid="other programs took 25 % of the processors"),
)  # fmt: skip


def test_the_table_is_the_golden_one() -> None:
    text = "\n".join([HEAD, *map(line, SWEEP), *summary(SWEEP)]) + "\n"
    if os.environ.get("DTRAIN_REWRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_link_that_is_not_known_has_no_share_and_one_rank_no_optimum() -> None:
    assert "%" not in line(sample(link_mbit=0.0, optimal_bytes=0, sent_bytes=10, world=1))
    assert "not known (bench.link=100mbit tells it)" in summary([sample(link_mbit=0.0)])[0]


def test_a_host_is_named_only_where_it_stands_out_from_noise() -> None:
    noise = [sample(op="broadcast", slowest_by=0.074)] * 6
    assert "c3" not in "\n".join([*map(line, noise), *summary(noise)])
    slow = [sample(op="broadcast", slowest_by=0.4)] * 6
    assert "2 on c3, +40.0%" in line(slow[0]) and "rank 2 on c3 was the slowest in 6 of 6 rows" in summary(slow)


def test_where_all_ranks_wait_for_each_other_the_doctor_is_sent_for() -> None:
    told = "\n".join(summary([sample(), sample(op="comm.all_gather"), sample(op="comm.shift")]))
    assert "in all_reduce, comm.all_gather all ranks wait" in told and "`dtrain doctor`" in told
    assert "dtrain doctor" not in "\n".join(summary([sample(op="broadcast"), sample(op="comm.shift")]))


def test_the_heads_of_bandwidths_tell_their_unit() -> None:
    assert "algbw Mbit/s busbw Mbit/s" in HEAD and HEAD.index("slowest rank") == line(sample()).rindex("-")


def test_a_sweep_that_is_terminated_cancels_its_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Watched:
        """A job that runs while somebody ends the command that watches it."""

        id = "7"
        cancelled = False

        def state(self) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            return "running"

        def cancel(self) -> None:
            self.cancelled = True

    job = Watched()
    how = Shown(Row, HEAD, lambda row, _: line(row), summary, report)
    assert show_rows(cast(Job, job), tmp_path, how) == 130 and job.cancelled
    assert "interrupted" in capsys.readouterr().out


def test_ranks_that_share_a_machine_are_said_to_measure_no_link() -> None:
    assert any("no link" in text for text in summary([sample(interface="lo", link_mbit=0.0)]))
    assert summary([]) == ["no row was finished"]


def test_a_fit_that_does_not_describe_its_sweep_is_not_printed() -> None:
    bent = [
        sample(bytes=size, p50_ms=time) for size, time in ((4000, 1.0), (16_000, 9.0), (10**6, 80.0), (10**7, 800.0))
    ]
    text = "\n".join(summary(bent))
    assert "all_reduce: no fit" in text and "alpha 0" not in text and "15% is allowed" in text
