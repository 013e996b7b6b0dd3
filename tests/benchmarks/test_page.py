"""The pure parts of `make evidence`: what is compared with what, and what a reader sees of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.compression import cells, compressors_report, loss_report
from benchmarks.equal_tokens import FACTORS, METHODS, SEEDS, equal_tokens_report
from benchmarks.evidence import circumstances
from benchmarks.fine_tuning import fine_tuning_report
from benchmarks.harness import Run, Session, as_figures
from benchmarks.kernels import Speed, kernels_report
from benchmarks.lgreco import PLAIN, SETTINGS, lgreco_report, solving_seconds
from benchmarks.one_byte import one_byte_report
from benchmarks.overlap import Exposure, overlap_report
from benchmarks.page import Check, Circumstances, Report, at_least, at_most, page, table
from benchmarks.provenance import ROOT
from benchmarks.shared_seed import DRAWN_POOLS, FEDAVG, KINDS, ONE_BYTE, Tuned, shared_seed_report
from benchmarks.slow_links import CHOSEN, LOCAL, SLOW, local_report, powersgd_report, slow_report
from benchmarks.step_timing import Asked, Took
from benchmarks.stopping import stopping_report
from benchmarks.training import (
    closing_text,
    default_report,
    fifteen_report,
    kill_report,
    quality_report,
    suite_report,
)
from benchmarks.vs_torchft import Asked as AskedBeside
from benchmarks.vs_torchft import Trained, torchft_report
from dtrain.comm.shared_seed.directions import Step
from dtrain.comm.shared_seed.update_log import Record
from dtrain.report.summary import Summary
from dtrain.train.config import compose
from tests.programs.machine import Machine
from tests.programs.machine import Run as MachineRun

MADE = Circumstances("2 cores", "2026-11-20 10:00 UTC", "abc123", "python 3.11", "0.1 at the start")


def run(*, first: float = 5.5, last: float = 2.0, sent: int = 1000, digest: str = "d0", printed: str = "") -> Run:
    summary = Summary(
        run="tmp/x", replicas=2, shards=2, engine="fsdp", steps=300, seconds=10.0, skipped_steps=0, loss=2.1,
        validation_loss=None if math.isnan(last) else last, evaluated="parameters", tokens_per_second=9.0,
        sent_bytes_per_rank=sent, dense_bytes_per_rank=4000, compute_utilization=0.9, exposed_fraction=0.1,
        parameters_digest=digest,
    )  # fmt: skip
    return Run("dtrain train run.dir=RUN", 12.5, printed, summary, (first, 3.0, last))


def missed(report: Report) -> list[str]:
    return [check.what for check in report.checks if not check.met]


def quality(off: float, sent: int) -> Report:
    return quality_report(run(sent=39_400), run(last=2.0 * (1 + off), sent=sent), run(last=2.5, sent=10))


# ---- lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [at_most, at_least])
def test_a_figure_on_its_line_meets_it_and_one_that_is_no_number_does_not(
    check: Callable[[str, float, float], Check],
) -> None:
    assert check("x", 0.8, 0.8).met
    assert not check("x", math.nan, 0.8).met
    assert "MISSED" in str(check("x", math.nan, 0.8))


@pytest.mark.parametrize(
    ("off", "sent", "lines"),
    [
        (0.0, 10_000, []),
        (0.009, 10_000, []),
        (-0.009, 10_000, []),
        (0.011, 10_000, ["validation loss of int8_ef, off dense"]),
        (-0.011, 10_000, ["validation loss of int8_ef, off dense"]),  # better than dense is not the same as dense
        (0.0, 10_200, ["bytes of dense over those of int8_ef"]),
    ],
)
def test_quality(off: float, sent: int, lines: list[str]) -> None:
    assert missed(quality(off, sent)) == lines


@pytest.mark.parametrize(
    ("first", "last", "lines"),
    [
        (5.5, 2.1, []),
        (5.5, 2.3, ["validation loss"]),
        (2.5, 2.1, ["last validation loss over the first"]),
        (math.nan, math.nan, ["last validation loss over the first", "validation loss"]),
    ],
)
def test_default(first: float, last: float, lines: list[str]) -> None:
    assert missed(default_report(run(first=first, last=last))) == lines


def test_fifteen_misses_its_line_if_one_loss_did_not_fall() -> None:
    runs = {("ddp", "dense"): run(), ("fsdp", "dense"): run(last=2.002), ("zero1", "diloco"): run()}
    report = fifteen_report(runs)
    assert missed(report) == []
    assert "differ by 1.0e-03" in report.body  # of the dense ones
    worse = fifteen_report({**runs, ("zero1", "diloco"): run(last=6.0)})
    assert missed(worse) == ["combinations whose validation loss fell"]
    assert "2 (at least 3)" in str(worse.checks[0])


RESTARTED = (
    "run x starts\nrank 2 failed: killed by SIGKILL (log: x)\nrestart 1 of at most 3, from the last checkpoint\n"
)


@pytest.mark.parametrize(
    ("digest", "printed", "lines"),
    [
        ("d0", RESTARTED, []),
        ("d1", RESTARTED, ["digests of the parameters"]),
        ("d0", "run x starts\n", ["restarts"]),  # then the kill hit nothing, and equal digests show nothing
    ],
)
def test_kill(digest: str, printed: str, lines: list[str]) -> None:
    report = kill_report(run(), run(digest=digest, printed=printed), step=150)
    assert missed(report) == lines
    assert report.commands[1].startswith(report.commands[0]) and "kill -9" in report.commands[1]


@pytest.mark.parametrize(("seconds", "code", "lines"), [(899, 0, []), (901, 0, ["minutes"]), (10, 2, ["exit code"])])
def test_suite(seconds: float, code: int, lines: list[str]) -> None:
    assert missed(suite_report(seconds, code, "400 passed", cores=2)) == lines


# ---- what is written -----------------------------------------------------------------------------------------------


def test_rows_of_a_table_are_as_wide_as_its_header() -> None:
    for report in (quality(0.0, 10_000), fifteen_report({("ddp", "dense"): run()}), kill_report(run(), run(), 150)):
        lines = [line for line in page(report, MADE).splitlines() if line.startswith("|")]
        blocks = re.split(r"\n(?!\|)", page(report, MADE))
        for block in blocks:
            widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
            assert len(widths) <= 1, block
        assert lines
    assert table(["a", "b"], []) == "| a | b |\n|---|---:|"


def test_a_page_says_what_was_missed_and_how_it_was_made() -> None:
    text = page(quality(0.5, 10_000), MADE)
    assert "**MISSED**" in text
    assert all(value in text for value in dataclasses.asdict(MADE).values())
    assert text.count("dtrain train run.dir=RUN") == 3
    assert text.endswith("```\n")


def test_the_closing_text_begins_where_the_last_line_names_the_run() -> None:
    printed = "run /tmp/x starts: 4 workers\nstep 300/300\nrun tmp/x      2 replicas\nloss 1\nsent 2\n"
    assert closing_text(run(printed=printed)) == "run tmp/x      2 replicas\nloss 1\nsent 2"


def test_figures_are_json_even_of_a_run_that_diverged() -> None:
    text = json.dumps(as_figures(run(last=math.nan)), allow_nan=False)
    assert json.loads(text)["validation_losses"] == [5.5, 3.0, None]


def test_a_missed_line_is_told_by_the_exit_code_and_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(session: Session) -> Report:
        raise RuntimeError("the run failed")

    def good(session: Session) -> Report:
        return quality(0.0, 10_000)

    def bad(session: Session) -> Report:
        return quality(0.5, 10_000)

    monkeypatch.setattr(command, "REPORTS", {"quality": good, "loss": bad, "slow": broken, "suite": broken})
    monkeypatch.setattr(command, "circumstances", lambda: MADE)
    monkeypatch.setattr(command, "require_clean", lambda: None)
    assert command.main(["quality", "--out", str(tmp_path)]) == 0
    assert "MISSED" not in capsys.readouterr().out
    assert command.main(["loss", "--out", str(tmp_path)]) == 1
    assert "off dense: 50 % (at most 1 %): MISSED" in capsys.readouterr().out
    assert command.main(["slow", "quality", "--out", str(tmp_path)]) == 1  # and goes on with the next
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.json", "loss.md", "quality.json", "quality.md"]
    figures = json.loads((tmp_path / "loss.json").read_text())
    assert figures["made"]["revision"] == "abc123" and not figures["checks"][0]["met"]


def test_a_signal_is_seen_within_a_second_by_every_rank_or_the_line_is_missed() -> None:
    good = stopping_report([[0.1, 0.2, 0.3, 0.4]] * 3, ["all_gather #9"] * 3)
    late = stopping_report([[0.1, 0.2, 0.3, 1.4]] * 3, ["all_gather #9"] * 3)
    deaf = stopping_report([[0.1, 0.2, 0.3], [0.1] * 4, [0.1] * 4], ["all_gather #9"] * 3)
    assert [[check.met for check in report.checks] for report in (good, late, deaf)] == [
        [True, True],
        [True, False],
        [False, True],
    ]


def test_what_is_long_runs_only_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def report(name: str) -> Callable[[Session], Report]:
        def measure(session: Session) -> Report:
            made.append(name)
            return quality(0.0, 10_000)

        return measure

    monkeypatch.setattr(command, "REPORTS", {name: report(name) for name in command.REPORTS})
    monkeypatch.setattr(command, "circumstances", lambda: MADE)
    monkeypatch.setattr(command, "require_clean", lambda: None)
    assert command.main(["--out", str(tmp_path)]) == 0
    assert made == [name for name in command.REPORTS if name not in command.LATER]
    with pytest.raises(SystemExit) as refused:
        command.main(["fiften"])
    assert refused.value.code == 2


def test_circumstances_are_found_out_on_any_machine() -> None:
    assert all(dataclasses.asdict(circumstances()).values())


def test_a_sweep_goes_on_with_what_it_has_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, ...]] = []

    def train(session: Session, *words: str, over: str = "") -> Run:
        trained.append((*words, over))
        return run(last=float(len(trained)))

    monkeypatch.setattr(Session, "train", train)
    for reused in (0, 3):
        session = Session(tmp_path / "new", tmp_path / "kept")
        assert session.cell("a", "b").validation == 1.0
        assert session.cell("a").validation == 2.0
        assert session.cell("a").validation == 2.0
        assert session.cell("a", over="10mbit").validation == 3.0
        assert len(session.reused) == reused
    assert trained == [("a", "b", ""), ("a", ""), ("a", "10mbit")]


def test_gaps_are_those_of_the_best_rates() -> None:
    runs = {"dense": run(), "int8_ef": run(last=2.01), "int4_ef": run(last=2.1)}
    swept = {
        ("dense", 0.3): run(last=1.5),
        ("dense", 1.0): run(),
        ("topk_ef", 0.3): run(last=3.0),
        ("topk_ef", 1.0): run(last=1.8),
    }
    report = loss_report(runs, swept)
    assert missed(report) == ["validation loss of 4 bits, off dense"]
    assert "| top-k 1 % | 3.0000 | 1.8000 | +20.0% |" in report.body


@pytest.mark.parametrize(
    ("sent", "loss", "seconds", "lines"),
    [(100, 2.0, 0.001, 0), (100, 1.5, 0.001, 0), (120, 2.0, 0.001, 1), (100, 2.1, 0.001, 1), (100, 2.0, 0.1, 2)],
)
def test_lgreco_is_held_to_bytes_loss_and_time(sent: int, loss: float, seconds: float, lines: int) -> None:
    pairs = {what: (run(sent=300), run(sent=200)) for what in SETTINGS}
    pairs[PLAIN] = (run(sent=140), run(sent=sent, last=loss))
    report = lgreco_report(pairs, seconds, {"PowerSGD rank 32": seconds})
    assert len(missed(report)) == lines


def test_solving_is_timed() -> None:
    assert 0 < solving_seconds() < 60


def test_a_kernel_that_allocates_or_is_slow_misses_its_line() -> None:
    good = {"eager": Speed(0.03, 3), "compiled": Speed(0.66, 0)}
    bad = {"eager": Speed(0.03, 3), "compiled": Speed(0.39, 1)}
    report = kernels_report({"8 bits": good, "4 bits": bad})
    assert missed(report) == ["4 bits, compiled, as a share of a copy", "allocations per call of compiled kernels"]


@pytest.mark.parametrize(("diloco", "dense", "lines"), [(0.84, 8.0, 0), (0.9, 8.0, 1), (0.84, 4.0, 1)])
def test_local_updates_are_held_to_their_utilization(diloco: float, dense: float, lines: int) -> None:
    found = {name: took(0.8) for name in LOCAL} | {"diloco/50:int8": took(diloco), "torch.all_reduce": took(dense)}
    found = {
        name: dataclasses.replace(each, beside=[0.8] * 3 if "nothing" not in name else [])
        for name, each in found.items()
    }
    assert len(missed(local_report(found, 5))) == lines


def took(seconds: float, *, payload: int = 1000, rounds: int = 3) -> Took:
    return Took([seconds] * rounds, payload + 50, payload)


@pytest.mark.parametrize(
    ("seconds", "payload", "lines"),
    [(1.04, 1000, 0), (1.06, 1000, 1), (1.0, 1001, 1), (0.9, 900, 0)],
)
def test_our_powersgd_is_held_to_theirs(seconds: float, payload: int, lines: int) -> None:
    ours = {"powersgd_ef:all_reduce": took(seconds, payload=payload), "powersgd_ef": took(1.0, payload=1006)}
    report = powersgd_report({"100mbit": {"torch.powersgd": took(1.0), **ours}})
    assert len(missed(report)) == lines
    assert "| 100mbit | powersgd_ef:all_reduce |" in report.body


@pytest.mark.parametrize(("chosen", "eight", "lines"), [(1.2, 1750, 0), (1.3, 1750, 1), (2.5, 1750, 2), (1.2, 1800, 1)])
def test_a_slow_network_is_held_to_its_lines(chosen: float, eight: int, lines: int) -> None:
    found = {name: took(1.0) for name in SLOW} | {"torch.all_reduce": took(8.0), CHOSEN: took(chosen)}
    assert len(missed(slow_report(found, {2: 1000, 4: 1500, 8: eight}))) == lines


@pytest.mark.parametrize(
    ("loss", "seconds", "sent", "lines"), [(2.0001, 0.9, 250, 0), (2.001, 0.9, 250, 1), (2.0, 1.1, 1000, 2)]
)
def test_our_diloco_is_held_to_torchfts(loss: float, seconds: float, sent: int, lines: int) -> None:
    theirs, ours = Trained([3.0, 2.0], [1.0, 1.0], 1000), Trained([3.0, loss], [0.9, 0.9], 1000)
    found = {"torchft": theirs, "fp32": ours, "8 bits": Trained([3.0, 2.1], [0.8, 0.8], 250)}
    found["4 bits"] = Trained([3.0, 2.2], [seconds, seconds], sent)
    assert len(missed(torchft_report(found, AskedBeside("")))) == lines


@pytest.mark.parametrize(("short", "long", "lines"), [(0.01, 1.2, 0), (0.3, 1.2, 1), (0.01, 2.0, 1)])
def test_overlap_hides_what_fits_and_the_rest_is_seen(short: float, long: float, lines: int) -> None:
    found = {"fast": Exposure(0.2, 0.5, short), "between": Exposure(0.2, 0.8, 0.1), "slow": Exposure(0.2, 2.0, long)}
    report = overlap_report(found)
    assert len(missed(report)) == lines and "xychart-beta" in report.body


@pytest.mark.parametrize(("diloco", "streaming", "lines"), [(2.05, 2.08, 0), (2.07, 2.1, 1), (2.0, 2.05, 1)])
def test_local_updates_are_held_to_the_loss_of_data_parallelism(diloco: float, streaming: float, lines: int) -> None:
    losses = dict(zip(METHODS, (2.0, diloco, streaming), strict=True))
    swept = {(name, factor): run(last=losses[name] + abs(factor - 1)) for name in METHODS for factor in FACTORS}
    repeated = {name: [run(last=loss)] * len(SEEDS) for name, loss in losses.items()}
    repeated["data parallelism"] = [run(last=loss) for loss in (2.5, 1.5, 2.0, 2.0, 2.0)]
    report = equal_tokens_report(swept, repeated, {"from scratch": run(last=3.0)})
    assert "| from scratch | - | - | - | 1 | 3.0000, one seed | +20.00% |" in report.body
    assert len(missed(report)) == lines


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_steps_are_timed_with_every_kind_of_exchange(tmp_path: Path) -> None:
    names = (
        "nothing",
        "torch.all_reduce",
        "torch.powersgd",
        "int4_ef",
        "powersgd_ef:all_reduce",
        "local_sgd/2:int8_ef",
    )
    asked = Asked(str(tmp_path / "found.json"), names, rounds=1, model=(32, 1, 2))
    run_ = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*run_, "-m", "benchmarks.step_timing", json.dumps(dataclasses.asdict(asked))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == list(names) and all(len(each["seconds"]) == 1 for each in found.values())
    payload = {name: each["payload_bytes"] for name, each in found.items()}
    assert payload["nothing"] == 0 < payload["torch.powersgd"] == payload["powersgd_ef:all_reduce"]


@pytest.mark.slow
def test_every_compressor_and_every_resume_is_in_the_report() -> None:
    one = {key: run() for key in cells()}
    five = {("sign_ef", "ddp"): (run(), run()), ("sign_ef", "zero3"): (run(), run(digest="d1"))}
    report = compressors_report(one, five)
    assert missed(report) == ["runs that ended with bitwise the same parameters after a resume"]
    assert all(f"| {compressor} | {feedback} |" in report.body for compressor, feedback in one)
    for words in cells().values():
        compose(["run.dir=x", *words])


def tuned(end: float, sent: float = 10.0) -> Tuned:
    curve = {"choose": [end] * 25, "test": [end - 0.3, *[end] * 24], "sent": [sent]}
    return Tuned("0.1", [curve, curve])


@pytest.mark.parametrize(
    ("ends", "cosine", "slope", "signs", "lines"),
    [((0.5, 0.9), 0.16, 1.01, 0.8, 0), ((0.9, 0.5), 0.16, 1.0, 0.8, 1), ((0.5, 0.9), 0.2, 0.97, 1.1, 3)],
)
def test_shared_randomness_is_held_to_its_lines(
    ends: tuple[float, float], cosine: float, slope: float, signs: float, lines: int
) -> None:
    tried = {name: tuned(0.8) for name in ONE_BYTE} | {"1 machine": tuned(ends[0]), "16 machines": tuned(ends[1])}
    names = [FEDAVG, "Ferret, K / d = 20%", *DRAWN_POOLS]
    federated = {(name, kind): tuned(0.85) for name in names for _, kind in KINDS}
    projected = [{"directions": 64.0, "draws": 2000.0, "cosine": cosine, "norm": 6.2, "slope": slope}]
    drifts = {"float32": dict.fromkeys((1, 10, 100, 1000), 1e-9)}
    replayed = {25: 0.25, 50: 0.5, 100: 1.0, 200: 2.0}
    report = shared_seed_report(tuned(0.95), tried, federated, drifts, projected, replayed, signs)
    assert len(missed(report)) == lines
    assert "10 ms a record" in report.body and "| 16 machines | 0.1 |" in report.body
    assert f"| {FEDAVG} | 0.850 ± 0.000 (0.1) | 0.850 ± 0.000 (0.1) | 2 | 10 |" in report.body


@pytest.mark.parametrize(("payload", "digest", "lines"), [(1500, 9, 0), (1503, 9, 1), (1500, 8, 1)])
def test_a_byte_is_held_to_be_one(payload: int, digest: int, lines: int) -> None:
    four, three = ((0, 1, 2, 3), b"abcd"), ((0, 1, 2), b"abc")
    crowds = [four if n < 120 else three for n in range(500)]
    records = [Record(Step(n, 0, who, 0.1, 0.0, codes), 5) for n, (who, codes) in enumerate(crowds)]
    machine = Machine("replica-0.log", 0, "", [5.0, 4.0], digest, payload, 9000, 60.0)
    stayed = MachineRun({"machine 0": machine}, {"machine 0": records}, 9)
    other = dataclasses.replace(machine, began=240, came_by="log", digest=9)
    went = MachineRun({"machine0": other, "newcomer": other}, {"machine0": records, "newcomer": records[240:]}, 9)
    report = one_byte_report(stayed, went)
    assert len(missed(report)) == lines
    assert "4, 3 from step 120 machines" in report.body and "the tail of the log" in report.body


@pytest.mark.parametrize(("after", "lines"), [(2.0, 0), (6.0, 1)])
def test_tuning_is_held_to_learning_something(after: float, lines: int) -> None:
    found = {("one byte", 1e-5): run(last=after), ("one byte", 1e-4): run(last=7.0), ("Ferret", 1e-3): run()}
    report = fine_tuning_report(run(), found)
    assert len(missed(report)) == lines
    assert f"1e-05: {after:.4f}, 0.0001: 7.0000" in report.body and "lr 0.001" in "".join(report.figures)
