"""The closing text (golden files; REWRITE_GOLDEN=1 rewrites them) and summary.json."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dtrain.report.figures import in_bytes, in_time
from dtrain.report.summary import Summary, read, render

GOLDEN = Path(__file__).parent / "golden"
SUMMARY = Summary(
    run="2026-11-20/streaming-int4",
    replicas=4,
    shards=2,
    engine="fsdp",
    steps=1000,
    seconds=192.3,
    skipped_steps=0,
    loss=1.6118,
    validation_loss=1.6549,
    evaluated="anchor parameters",
    tokens_per_second=84_120.4,
    sent_bytes_per_rank=41_234_567,
    dense_bytes_per_rank=4_870_000_000,
    compute_utilization=0.974,
    exposed_fraction=0.0058,
    parameters_digest="ab" * 32,
)
CASES = {
    "compressed": SUMMARY,
    "dense": replace(
        SUMMARY,
        run="dense",
        replicas=1,
        shards=1,
        engine="ddp",
        steps=1,
        seconds=4.2,
        evaluated="parameters",
        sent_bytes_per_rank=4_870_000_000,
    ),
    "nothing_measured": replace(
        SUMMARY,
        skipped_steps=3,
        loss=None,
        validation_loss=None,
        tokens_per_second=None,
        sent_bytes_per_rank=0,
        compute_utilization=None,
        exposed_fraction=None,
    ),
    "more_than_dense": replace(SUMMARY, sent_bytes_per_rank=9_000_000_000, seconds=100_000),
}


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    golden = GOLDEN / f"{case}.txt"
    text = render(CASES[case]) + "\n"
    if os.environ.get("REWRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("summary", CASES.values(), ids=CASES.keys())
def test_what_was_written_is_read(tmp_path: Path, summary: Summary) -> None:
    summary.write(tmp_path / "summary.json")
    assert read(tmp_path / "summary.json") == summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    replace(SUMMARY, loss=math.nan, validation_loss=math.inf).write(path)
    figures = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert figures["loss"] is None and figures["validation_loss"] is None


@pytest.mark.parametrize("text", ["{}", '{"of": []}', '{"steps": 3}'])
def test_what_is_no_summary_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"summary.json is not the summary of a run: it lacks run"):
        read(path)


@pytest.mark.parametrize("name", [field.name for field in fields(Summary)])
@pytest.mark.parametrize("value", ["[]", "{}", "true", "1e999", "NaN", "1" * 400, "-1", '"x"', "[" * 99_999])
def test_a_damaged_figure_is_refused_or_can_be_shown(name: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    figures = {key: json.dumps(figure) for key, figure in json.loads(path.read_text()).items()} | {name: value}
    path.write_text("{" + ", ".join(f'"{key}": {text}' for key, text in figures.items()) + "}")
    with contextlib.suppress(ValueError):
        render(read(path))


def test_unknown_figures_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_later_version": 1}))
    assert read(path) == SUMMARY


def test_figures_round_to_the_next_unit() -> None:
    assert [in_bytes(count) for count in (0, 999, 1000, 9_994, 9_996, 999_499, 999_600)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "9.99 kB",
        "10.0 kB",
        "999 kB",
        "1.00 MB",
    ]
    assert [in_time(seconds) for seconds in (0, 59.94, 59.96, 3599.4, 3599.9, 86_399)] == [
        "0.0 s",
        "59.9 s",
        "1 m 00 s",
        "59 m 59 s",
        "1 h 00 m",
        "1 d 00 h",
    ]
